"""Attentions converted, trained back and quantized: what is left of the pictures, by how many are converted and the steps.

    python -m tools.measure_conversion mini --stats stats '{local_attention: {shape: tiles, window: 3, tile: 2}}' \\
      --shares 0.5,1 --steps 0,100,1000 --quantized 1000

A method is one pass with its settings; of a share below 1 those attentions are converted that alone move the answer least.
`--steps` are those of `distill` behind it, from one conversion; after those in `--quantized` the recipe is compiled into the
model too. Rows without a method are of the original with that recipe alone. All are measured on held-out prompts: the
denoiser's signal to error along the original's trajectories, the PSNR of pictures from the same noise to the original's, and
the distance of all to those in features (lite0-FD; of few pictures it is large, so compare rows of equally many).
With `--size` they are drawn larger or smaller than what was converted and learned on.
Statistics for the recipe are gathered on the first prompts of `--stats`, of the model as it is then.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from ditq.calibration.calibrate import choose_conditions
from ditq.calibration.collect import collect_statistics
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.devices import device_of
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.pass_pipeline import run_passes
from ditq.passes import Context
from ditq.recipe import Recipe, load_recipe
from ditq.report.evaluate import heldout_conditions
from tools.held_out import Changed, HeldOut, context_of, distance
from tools.measure_recipes import table


def first_prompts(trajectories: Trajectories, count: int) -> Trajectories:
    """The recording of the first prompts alone."""
    return Trajectories(trajectories.folder, {**trajectories.index, "conditions": trajectories.conditions[:count]})


def quantize(graph: DiTGraph, recipe: Recipe, trajectories: Trajectories, device: torch.device) -> None:
    """Run the recipe over a restructured graph, on statistics of what its layers get now."""
    graph.model.to(device)
    try:
        statistics = collect_statistics(graph, trajectories, progress=False)
    finally:
        graph.model.to("cpu")
    run_passes(graph, recipe, statistics)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.argument("methods", nargs=-1)
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--shares", default="0.5,1", show_default=True, help="Of the attentions that are converted.")
@click.option("--steps", default="0", show_default=True, help="Steps of distillation.")
@click.option("--quantized", default="", help="Steps after which it is quantized too.")
@click.option("--plain", is_flag=True, help="Also the original, quantized alone.")
@click.option("--recipe", default="w4a8", show_default=True)
@click.option("--recipe-prompts", default=16, show_default=True, help="Prompts that the recipe's statistics are of.")
@click.option("--rate", default=3e-4, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--prompts", help="Set or file of prompts to judge on; by default those of `ditq evaluate`.")
@click.option("--captions", default=16, show_default=True, help="How many of them.")
@click.option("--size", type=int, help="Pixels along a side of what is drawn, if not the checkpoint's own.")
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
    methods: tuple[str, ...],
    stats: Path,
    shares: str,
    steps: str,
    quantized: str,
    plain: bool,
    recipe: str,
    recipe_prompts: int,
    rate: float,
    batch: int,
    prompts: str | None,
    captions: int,
    size: int | None,
    seed: int,
    device: str,
) -> None:
    opened, place, coded = Checkpoint.open(checkpoint), device_of(device), load_recipe(recipe)
    context = context_of(opened, Statistics.open(stats, opened.fingerprint()))
    few = first_prompts(context.trajectories(), recipe_prompts)
    chosen = heldout_conditions(opened, captions) if prompts is None else choose_conditions(opened, prompts, captions)
    held_out = HeldOut(opened, chosen, seed, place, {} if size is None else {"height": size, "width": size})
    rows: list[list[str]] = []
    began = time.perf_counter()

    def measured(graph: DiTGraph, *said: str) -> None:
        nonlocal began
        level, drawn = held_out.of(graph.model)
        minutes = (time.perf_counter() - began) / 60
        far = distance(held_out.wanted.pictures, drawn.pictures)
        rows.append([*said, level, f"{held_out.psnr(drawn):.2f}", far, f"{minutes:.1f}"])
        click.echo("  ".join(rows[-1]), err=True)
        began = time.perf_counter()

    def with_recipe(graph: DiTGraph, *said: str) -> None:
        quantize(graph, coded, few, place)
        measured(graph, *said, recipe)

    if plain:
        with_recipe(DiTGraph(opened.load_model(), example_inputs(opened)), "", "", "", "")
    for share in map(float, shares.split(",")):
        for method in methods:
            for said, graph, count in converted(opened, context, method, share, numbers(steps), rate, batch):
                measured(graph, *said, str(count), "")
                if count in numbers(quantized):
                    with_recipe(graph, *said, str(count))
    header = [
        "method",
        "attentions",
        "multiply-adds",
        "steps",
        "recipe",
        "denoiser, dB",
        "PSNR, dB",
        "lite0-FD",
        "minutes",
    ]
    table(header, rows)


def converted(
    opened: Checkpoint, context: Context, method: str, share: float, steps: list[int], rate: float, batch: int
) -> Any:
    """(what was converted, the model after it and so many steps, the steps) for each number of them."""
    passes: list[dict[str, Any]] = [yaml.safe_load(method)]
    for settings in passes[0].values():
        settings["fraction"] = share
    changed = Changed(opened, Recipe.from_dict({"passes": passes}, method).passes, context)
    summary = changed.reports[0].summary
    macs = summary["multiply-adds of attention, of those before"]
    said = [method.removeprefix("{").removesuffix("}"), f"{summary['attentions']} of {summary['of']}", f"{macs:.2f}"]
    for count in steps:
        distill = {"steps": max(count, 1), "rate": rate, "batch": batch, "precision": "float32"}
        behind = Recipe.from_dict({"passes": [*passes, {"distill": distill}]}, method).passes[1:] if count else ()
        yield said, changed.after(behind)[0], count


if __name__ == "__main__":
    main()
