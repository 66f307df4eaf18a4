"""What the format of the activations loses, each form alone: the weights stay as they are.

    python -m tools.measure_activations mini --stats stats
    python -m tools.measure_activations mini --stats stats --recipe w4a4 --pictures 8

SQNR in dB of the outputs of token linears, averaged over linears, behind the smoothing and rotation of `--recipe`. Formats
are chosen on every other sampled row and judged on the rows between. With `--pictures` the recipe itself is run with each
format and its pictures are compared with the original's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.passes import Context
from ditq.passes.activation_formats import ActivationSettings, InputFormats
from ditq.passes.folding import plain_linear
from ditq.recipe import load_recipe
from tools.measure_recipes import Bench, split_at_quantize, table

VARIANTS: dict[str, dict[str, Any]] = {
    "symmetric": {"activation_grid": "symmetric", "activation_clip": False},
    "symmetric, clipped": {"activation_grid": "symmetric", "activation_clip": True},
    "mid-rise": {"activation_grid": "midrise", "activation_clip": False},
    "mid-rise, clipped": {"activation_grid": "midrise", "activation_clip": True},
    "symmetric, groups of 64": {"activation": "group"},
    "mid-rise, groups of 64": {"activation": "group", "activation_grid": "midrise"},
    "mid-rise, clipped, groups of 64": {"activation": "group", "activation_grid": "midrise", "activation_clip": True},
}


def _every_other(found: InputStatistics, start: int) -> InputStatistics:
    return replace(found, sample=found.sample[start::2], sample_bin=found.sample_bin[start::2])


def layer_sqnr(graph: DiTGraph, context: Context, bits: list[int]) -> list[list[str]]:
    """One row a variant: SQNR at each number of bits."""
    sites = [name for name, site in graph.sites.items() if site.role == "token"]
    found: dict[tuple[str, int], list[float]] = {}
    for name in sites:
        statistics, weight = context.statistics(graph.sites[name].group), plain_linear(graph, name).weight
        judged = _every_other(statistics, 1).sample
        expected = judged @ weight.T
        for variant, settings in VARIANTS.items():
            for number in bits:
                if number > 7 and settings.get("activation_grid") == "midrise":
                    continue
                plan = {site: ActivationSettings(f"w4a{number}", **settings) for site in sites}
                chosen = InputFormats(graph, plan).of(name, _every_other(statistics, 0))
                error = (chosen.format.rounded(judged, chosen.scale) @ weight.T - expected).square().sum()
                found.setdefault((variant, number), []).append(float(error / expected.square().sum()))
    return [
        [variant, *(_mean_sqnr(found[variant, number]) if (variant, number) in found else "" for number in bits)]
        for variant in VARIANTS
    ]


def _mean_sqnr(errors: list[float]) -> str:
    return f"{-sum(10 * math.log10(error) for error in errors) / len(errors):.2f}"


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="A folder of `ditq calibrate`.")
@click.option("--recipe", default="w4a4", show_default=True)
@click.option("--bits", "bits", multiple=True, default=(4, 5, 6, 8), show_default=True)
@click.option("--pictures", default=0, help="Held-out prompts to draw instead.")
@click.option("--only", multiple=True, help="Variants; default: all.")
def main(
    checkpoint: str, stats: Path, recipe: str, bits: tuple[int, ...], pictures: int, only: tuple[str, ...]
) -> None:
    opened = Checkpoint.open(checkpoint)
    statistics = Statistics.open(stats, opened.fingerprint())
    before, quantize = split_at_quantize(load_recipe(recipe))
    if not pictures:
        graph, context = DiTGraph(opened.load_model(), example_inputs(opened)), Context(statistics)
        with torch.no_grad():
            for step in before:
                step.run(graph, context)
            rows = layer_sqnr(graph, context, list(bits))
        table([f"activations behind {recipe}", *(f"{number} bits" for number in bits)], rows)
        return
    bench, rows = Bench(opened, pictures, 1000), []
    for variant, settings in VARIANTS.items():
        if not only or variant in only:
            steps = [{step.name: step.settings()} for step in before]
            steps.append({"quantize": {**quantize.settings(), **settings}})
            model, _ = bench.passes(steps, statistics)
            rows.append([recipe, variant, *(f"{value:.2f}" for value in bench.quality(model))])
            click.echo(" ".join(rows[-1]), err=True)
    table(["recipe", "activations", "PSNR, dB", "worst"], rows)


if __name__ == "__main__":
    main()
