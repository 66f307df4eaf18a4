"""How much rounding loses with each of its settings, judged on inputs that it was not fitted to.

    python -m tools.measure_rounding mini --fit stats-a --judge stats-b
    python -m tools.measure_rounding mini --fit stats --pictures 8 --only "refine 4"

`fit` and `judge` are two folders of `ditq calibrate` with different prompts. Two figures, in dB, averaged over linears:
what the weights alone lose on all of judge's inputs (the bias corrected by fit's mean), and what the layer loses on
judge's sampled rows, activations quantized too. `pictures` draws with the variants and compares with the original's.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn import QuantLinear
from ditq.passes import Context
from ditq.passes.folding import plain_linear
from ditq.passes.quantize import Quantize
from ditq.recipe import Recipe, load_recipe
from tools.measure_recipes import Bench, split_at_quantize, table

VARIANTS: dict[str, dict[str, Any]] = {
    "gptq": {"refine": 0},
    "refine 1": {"refine": 1},
    "refine 2": {"refine": 2},
    "refine 4": {"refine": 4},
    "refine 8": {"refine": 8},
    "scale search 3": {"refine": 0, "scale_search": 3},
    "scale search 7": {"refine": 0, "scale_search": 7},
    "scale search 5, refine 4": {"refine": 4, "scale_search": 5},
    "scale search 7, refine 4": {"refine": 4, "scale_search": 7},
    "activation noise, refine 4": {"refine": 4, "activation_noise": True},
    "centred, refine 4": {"refine": 4, "centred": True},
    "damping 0.001, refine 4": {"refine": 4, "damping": 0.001},
    "damping 0.03, refine 4": {"refine": 4, "damping": 0.03},
    "damping 0.1, refine 4": {"refine": 4, "damping": 0.1},
    "all": {"refine": 4, "scale_search": 7, "activation_noise": True, "damping": 0.03},
}


def weights_error(weight: Tensor, layer: QuantLinear, shift: Tensor, judge: InputStatistics) -> float:
    """E|x (W - Q)^T - shift|^2 / E|x W^T|^2 over all of judge's rows; shift [O] is what the bias took up."""
    hessian, mean, lost = judge.hessian().double(), judge.mean().double(), (weight - layer.weight()).double()
    error = ((lost @ hessian) * lost).sum() - 2 * (shift * (lost @ mean)).sum() + shift.square().sum()
    return float(error / ((weight.double() @ hessian) * weight).sum())


def layer_errors(
    checkpoint: Checkpoint, recipe: str, fit: Statistics, judge: Statistics, every: int, only: tuple[str, ...]
) -> list[list[str]]:
    """One row a variant: the two figures, in dB, and seconds."""
    graph = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))
    context, judging = Context(fit), Context(judge)
    judging.changes = context.changes
    before, quantize = split_at_quantize(load_recipe(recipe))
    assert isinstance(quantize, Quantize)
    for step in before:
        step.run(graph, context)
    sites = [name for name, site in graph.sites.items() if site.role == "token"][::every]
    original = {name: (graph.linear(name), plain_linear(graph, name)) for name in sites}
    rows = []
    for variant, settings in VARIANTS.items():
        if only and variant not in only:
            continue
        changed = {**quantize.settings(), "select": sites, "rules": [], **settings}
        step = Recipe.from_dict({"passes": [{"quantize": changed}]}, "measured").passes[0]
        began = time.perf_counter()
        step.run(graph, context)
        seconds, alone, whole = time.perf_counter() - began, [], []
        for name, (module, linear) in original.items():
            layer, seen = graph.linear(name), judging.statistics(graph.sites[name].group)
            assert isinstance(layer, QuantLinear)
            bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
            shift = torch.zeros_like(bias) if layer.bias is None else layer.bias - bias
            alone.append(weights_error(linear.weight, layer, shift.double(), seen))
            layer.transform = None  # the sample is that of the transformed input
            expected = seen.sample @ linear.weight.T
            whole.append(float((layer(seen.sample) - bias - expected).square().sum() / expected.square().sum()))
            graph.replace(name, module)
        figures = [sum(10 * math.log10(error) for error in errors) / len(sites) for errors in (alone, whole)]
        rows.append([recipe, variant, *(f"{figure:.2f}" for figure in figures), f"{seconds:.1f}"])
        click.echo(" ".join(rows[-1]), err=True)
    return rows


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--fit", required=True, type=click.Path(path_type=Path), help="Statistics that the codes are fitted to.")
@click.option("--judge", type=click.Path(path_type=Path), help="Statistics of other prompts, to judge by.")
@click.option("--recipe", "recipes", multiple=True, default=("w4a8", "w3a8", "w4a4"), show_default=True)
@click.option("--every", default=5, show_default=True, help="Only every n-th linear.")
@click.option("--pictures", default=0, help="Held-out prompts to draw instead.")
@click.option("--only", multiple=True, help="Variants; default: all.")
def main(
    checkpoint: str,
    fit: Path,
    judge: Path | None,
    recipes: tuple[str, ...],
    every: int,
    pictures: int,
    only: tuple[str, ...],
) -> None:
    opened = Checkpoint.open(checkpoint)
    statistics = Statistics.open(fit, opened.fingerprint())
    if not pictures:
        if judge is None:
            raise click.UsageError("give --judge, statistics of other prompts, or --pictures")
        judged = Statistics.open(judge, opened.fingerprint())
        with torch.no_grad():
            rows = [row for name in recipes for row in layer_errors(opened, name, statistics, judged, every, only)]
        table(["recipe", "variant", "weights alone, dB", "layer, dB", "s"], rows)
        return
    bench, rows = Bench(opened, pictures, 1000), []
    for name in recipes:
        for variant, settings in VARIANTS.items():
            if only and variant not in only:
                continue
            before, quantize = split_at_quantize(load_recipe(name))
            steps = [{step.name: step.settings()} for step in before]
            model, _ = bench.passes([*steps, {"quantize": {**quantize.settings(), **settings}}], statistics)
            rows.append([name, variant, *(f"{value:.2f}" for value in bench.quality(model))])
            click.echo(" ".join(rows[-1]), err=True)
    table(["recipe", "variant", "PSNR, dB", "worst"], rows)


if __name__ == "__main__":
    main()
