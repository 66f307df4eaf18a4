"""Quality against activated parameters: mixtures of experts, pruned feed-forwards of the same active width, fewer blocks.

    python -m tools.measure_experts mini --stats stats --forms moe,random,prune --active 0.75,0.5625,0.375 --steps 0,100

`moe` is the pass with its defaults but for `top`; `random` divides the channels at random; `better` lets each feed-forward
choose; `prune` keeps the channels needed most, `taylor` those of the highest Taylor importance. `depth` drops the same blocks
at all timesteps and `mob` others in each bin of timesteps, of each stack as `--depth` says. `--steps` are those of `distill`
behind it, from a form that is made once for all of them. All are measured on held-out prompts that nothing was learned from:
the denoiser's error along the original's trajectories, and pictures drawn from the same noise: their PSNR, and the distances
(lite0-FD) of all of them together to the original's and, with `--real`, to as many real pictures of the same captions.
`linears` is the share of the parameters of the blocks' linears over tokens that one token passes through; `loads` the least and
the most of the tokens that an expert gets. The first `minutes` of a form hold its making.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.cost_model import Costs, costs_after, costs_before
from ditq.devices import device_of
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.recipe import Recipe
from ditq.report.evaluate import heldout_conditions
from tools.emoji_data import load_emoji
from tools.held_out import Changed, HeldOut, context_of, distance
from tools.measure_recipes import table


def recipe(
    form: str,
    active: float,
    steps: int,
    settings: dict[str, Any],
    depth: str,
    rate: float,
    batch: int,
    shared: float,
    experts: int,
) -> Recipe:
    """One form at one share of active channels, distilled for so many steps."""
    if form in ("depth", "mob"):
        bins = 1 if form == "depth" else 4
        stacks = [part.replace("/", "=").split("=") for part in depth.split(",") if part]
        first = [
            {"mob": {"select": [stack], "keep": int(keep), "group": int(size), "bins": bins}}
            for stack, keep, size in stacks
        ]
        if not first:
            raise click.UsageError(f"{form}: give --depth, such as transformer_blocks=2/3")
    elif form in ("prune", "taylor"):
        importance = "taylor" if form == "taylor" else "needed"
        first = [{"prune": {"keep": active, "importance": importance, **settings}}]
    else:
        each = (1 - shared) / experts
        top = round((active - shared) / each)
        if top < 1:
            least = shared + each
            raise click.UsageError(
                f"--active {active}: leaves no routed expert; at least {least:.4g}, or less --shared"
            )
        given = {"moe": {}, "random": {"split": "random"}, "better": {"choose": "better"}}[form]
        first = [{"moe": {"shared": shared, "experts": experts, "top": top, **given, **settings}}]
    behind = [{"distill": {"steps": steps, "rate": rate, "batch": batch, "precision": "float32"}}] if steps else []
    return Recipe.from_dict({"passes": [*first, *behind]}, f"{form} {active}")


def active_linears(before: Costs, after: Costs) -> float:
    """The share of the parameters of linears over tokens in blocks that a token passes through."""
    parts = ("token linears", "feed-forward")
    count = [sum(work.activated for work in costs.works.values() if work.part in parts) for costs in (before, after)]
    return count[1] / count[0]


def real_pictures(folder: Path, conditions: list[str | int], size: int) -> np.ndarray:
    """Of each caption the first picture in the emoji sets: uint8 [N, H, W, 3]."""
    data = load_emoji(folder, size)
    places = {caption: number for number, caption in reversed(list(enumerate(data.captions)))}
    return data.pictures[[places[str(condition)] for condition in conditions]].permute(0, 2, 3, 1).numpy()


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--forms", default="moe,random,prune", show_default=True, help="moe, random, better, prune, taylor.")
@click.option("--active", default="0.75,0.5625,0.375", show_default=True, help="Shares of active hidden channels.")
@click.option("--steps", default="0", show_default=True, help="Steps of distillation.")
@click.option("--depth", default="", help="Blocks that stay, for depth and mob: STACK=KEEP/GROUP with commas between.")
@click.option(
    "--real", type=click.Path(path_type=Path), help="Folder of the emoji packages, as tools.train_mini fetches them."
)
@click.option("--select", default="*", show_default=True, help="Which feed-forwards; patterns with commas between.")
@click.option("--samples", default=256, show_default=True, help="Calls that the passes look at.")
@click.option("--rate", default=3e-4, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--shared", default=0.25, show_default=True, help="Of the hidden channels, those of the shared expert.")
@click.option("--experts", default=12, show_default=True, help="That the others are divided into.")
@click.option("--captions", default=16, show_default=True, help="Held-out prompts.")
@click.option("--seed", default=1000, show_default=True)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where pictures are drawn; models learn on a GPU if there is one.",
)
def main(
    *,
    checkpoint: str,
    stats: Path,
    forms: str,
    active: str,
    steps: str,
    depth: str,
    real: Path | None,
    select: str,
    samples: int,
    rate: float,
    batch: int,
    shared: float,
    experts: int,
    captions: int,
    seed: int,
    device: str,
) -> None:
    opened = Checkpoint.open(checkpoint)
    statistics = Statistics.open(stats, opened.fingerprint())
    conditions = list(heldout_conditions(opened, captions))
    held_out = HeldOut(opened, conditions, seed, device_of(device))
    wanted, context = held_out.wanted, context_of(opened, statistics)
    measured = [("original", wanted.pictures)]
    if real is not None:
        measured.append(("real", real_pictures(real, conditions, wanted.pictures.shape[1])))
        click.echo(f"lite0-FD of the original's pictures to real ones: {distance(*(found for _, found in measured))}")
    rows = []
    for share in map(float, active.split(",")):
        for form in forms.split(","):
            given = {"samples": samples, "select": select.split(",")}
            began = time.perf_counter()
            made = recipe(form, share, 0, given, depth, rate, batch, shared, experts)
            fresh = DiTGraph(opened.load_model(), example_inputs(opened))
            linears = active_linears(costs_before(fresh), costs_after(fresh, made))
            changed = Changed(opened, made.passes, context)
            for count in map(int, steps.split(",")):
                behind = recipe(form, share, count, given, depth, rate, batch, shared, experts).passes[
                    len(made.passes) :
                ]
                graph, trained = changed.after(behind)
                reports = [*changed.reports, *trained]
                level, drawn = held_out.of(graph.model)
                minutes = (time.perf_counter() - began) / 60
                began = time.perf_counter()
                local = reports[0].summary.get("mean error")
                alone = "" if local is None else f"{local:.4f}"
                figures = [
                    level,
                    f"{held_out.psnr(drawn):.2f}",
                    *(distance(drawn.pictures, p) for _, p in measured),
                ]
                loads = reports[-1].summary.get("least and most of the tokens an expert gets")
                spread = "" if loads is None else " to ".join(f"{100 * load:.1f} %" for load in loads)
                row = [form, f"{share:.4g}", f"{linears:.3f}", str(count), alone, *figures, spread, f"{minutes:.1f}"]
                rows.append(row)
                click.echo("  ".join(row), err=True)
    distances = [f"lite0-FD, {name}" for name, _ in measured]
    table(
        [
            "form",
            "active",
            "linears",
            "steps",
            "error of one alone",
            "denoiser, dB",
            "PSNR, dB",
            *distances,
            "loads",
            "minutes",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
