"""Quality against activated parameters of feed-forwards: mixtures of experts, and pruned ones of the same active width.

    python -m tools.measure_experts mini --stats stats --forms moe,random,prune --active 0.75,0.5625,0.375 --steps 0,100

`moe` is the pass with its defaults but for `top`; `random` divides the channels at random; `better` lets each feed-forward
choose; `prune` keeps the channels needed most, `taylor` those of the highest Taylor importance. `--steps` are those of
`distill` behind it. All are measured on held-out prompts that nothing was learned from: the denoiser's error along the
original's trajectories, and pictures drawn from the same noise.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from ditq.calibration.batches import sampled_batches
from ditq.calibration.record import record_trajectories
from ditq.calibration.sampling import SamplingSettings
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.compiler import run_passes
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.recipe import Recipe
from ditq.report.evaluate import heldout_conditions
from tools.measure_denoiser import Denoiser
from tools.measure_recipes import table
from tools.peers.draw import Drawn, draw

SHARED, EXPERTS = 0.25, 12


def recipe(form: str, active: float, steps: int, settings: dict[str, Any], rate: float, batch: int) -> Recipe:
    """One form at one share of active channels, distilled for so many steps."""
    if form in ("prune", "taylor"):
        importance = "taylor" if form == "taylor" else "needed"
        first: dict[str, Any] = {"prune": {"keep": active, "importance": importance, **settings}}
    else:
        top = round((active - SHARED) / ((1 - SHARED) / EXPERTS))
        if top < 1:
            raise click.UsageError(f"--active {active}: leaves no routed expert; mixtures have at least 0.3125 here")
        given = {"moe": {}, "random": {"split": "random"}, "better": {"choose": "better"}}[form]
        first = {"moe": {"shared": SHARED, "experts": EXPERTS, "top": top, **given, **settings}}
    behind = [{"distill": {"steps": steps, "rate": rate, "batch": batch}}] if steps else []
    return Recipe.from_dict({"passes": [first, *behind]}, f"{form} {active}")


def picture_psnr(original: Drawn, other: Drawn) -> float:
    """Mean over the pictures, in dB."""
    a, b = (torch.from_numpy(drawn.pictures).double() for drawn in (original, other))
    errors = (a - b).square().flatten(1).mean(1).clamp_min(1e-3)
    return float((10 * torch.log10(255**2 / errors)).mean())


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--forms", default="moe,random,prune", show_default=True, help="moe, random, better, prune, taylor.")
@click.option("--active", default="0.75,0.5625,0.375", show_default=True, help="Shares of active hidden channels.")
@click.option("--steps", default="0", show_default=True, help="Steps of distillation.")
@click.option("--select", default="*", show_default=True, help="Which feed-forwards; patterns with commas between.")
@click.option("--samples", default=256, show_default=True, help="Calls that the passes look at.")
@click.option("--rate", default=3e-4, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--captions", default=16, show_default=True, help="Held-out prompts.")
@click.option("--seed", default=1000, show_default=True)
def main(
    *,
    checkpoint: str,
    stats: Path,
    forms: str,
    active: str,
    steps: str,
    select: str,
    samples: int,
    rate: float,
    batch: int,
    captions: int,
    seed: int,
) -> None:
    opened = Checkpoint.open(checkpoint)
    statistics = Statistics.open(stats, opened.fingerprint())
    settings = SamplingSettings.for_checkpoint(opened, None, seed, {})
    conditions = list(heldout_conditions(opened, captions))
    pipeline = opened.load_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        recorded = record_trajectories(opened, conditions[:8], settings, Path(folder) / "calls", False)
        batches = sampled_batches(recorded, 1 << 30, 16)
        judge = Denoiser(opened.load_model(), batches, recorded.steps, None, None)
    arguments = dict(settings.arguments)
    wanted = draw(pipeline, conditions, arguments, seed, 16)
    rows = []
    for share in map(float, active.split(",")):
        for form in forms.split(","):
            for count in map(int, steps.split(",")):
                began = time.perf_counter()
                given = {"samples": samples, "select": select.split(",")}
                made = recipe(form, share, count, given, rate, batch)
                graph = DiTGraph(opened.load_model(), example_inputs(opened))
                reports = run_passes(graph, made, statistics)
                minutes = (time.perf_counter() - began) / 60
                level = judge.figures(graph.model)[1]
                pipeline.transformer = graph.model
                psnr = picture_psnr(wanted, draw(pipeline, conditions, arguments, seed, 16))
                local = reports[0].summary["mean error"]
                row = [form, f"{share:.4g}", str(count), f"{local:.4f}", level, f"{psnr:.2f}", f"{minutes:.1f}"]
                rows.append(row)
                click.echo("  ".join(row), err=True)
    table(["form", "active", "steps", "error of one alone", "denoiser, dB", "PSNR, dB", "minutes"], rows)


if __name__ == "__main__":
    main()
