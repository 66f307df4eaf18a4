"""What each codebook loses, judged on inputs that it was not fitted to.

    python -m tools.measure_codebooks mini --fit stats-a --judge stats-b --every 6 --rotation none
    python -m tools.measure_codebooks mini --fit stats-a --judge stats-b --bits 4 --carrier int8 --carrier float8_e4m3

`fit` and `judge` are two folders of `ditq calibrate` with different prompts. The figure is the output SQNR of the weights
alone, inputs as they are, in dB, averaged over token linears: on all of judge's inputs, the bias corrected by fit's mean.
Rounding is to the nearest level, or GPTQ with four sweeps of refinement; in front of
it no rotation, a block Hadamard or a full one.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import click
import torch

from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn import QuantLinear
from ditq.numerics.codebook import CODEBOOKS
from ditq.passes import Context
from ditq.passes.activation_formats import PRODUCTS
from ditq.passes.choose_codebook import AUTO
from ditq.passes.folding import plain_linear
from ditq.recipe import Recipe
from tools.measure_recipes import table
from tools.measure_rounding import weights_error

ROTATIONS: dict[str, dict[str, Any]] = {
    "none": {"mode": "identity", "values": False},
    "block Hadamard 64": {"mode": "block_hadamard", "block": 64},
    "full Hadamard": {"mode": "hadamard"},
}
ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"},
    "gptq": {"rounding": "gptq", "refine": 4},
}
Figures = dict[tuple[str, str, str, str, int], float]


def _steps(*steps: dict[str, Any]) -> list[Any]:
    return list(Recipe.from_dict({"passes": list(steps)}, "measured").passes)


def sqnr(
    checkpoint: Checkpoint,
    fit: Statistics,
    judge: Statistics,
    codebooks: list[str],
    bits: list[int],
    rotations: list[str],
    carriers: list[str],
    every: int,
) -> Figures:
    """(rotation, carrier, rounding, codebook, bits) -> mean SQNR in dB."""
    found: Figures = {}
    for rotation in rotations:
        graph = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))
        context, judging = Context(fit), Context(judge)
        judging.changes = context.changes
        for step in _steps({"rotate": ROTATIONS[rotation]}):
            step.run(graph, context)
        sites = [name for name, site in graph.sites.items() if site.role == "token"][::every]
        original = {name: (graph.linear(name), plain_linear(graph, name)) for name in sites}
        for carrier, rounding in itertools.product(carriers, ROUNDINGS):
            for codebook in codebooks:
                for number in bits:
                    if codebook != AUTO and CODEBOOKS[codebook].refusal(number):
                        continue
                    began = time.process_time()
                    settings = {"format": f"w{number}a16", "codebook": codebook, "carrier": carrier, "select": sites}
                    (step,) = _steps({"quantize": settings | ROUNDINGS[rounding]})
                    step.run(graph, context)
                    decibels = 0.0
                    for name, (module, linear) in original.items():
                        layer, seen = graph.linear(name), judging.statistics(graph.sites[name].group)
                        assert isinstance(layer, QuantLinear)
                        bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
                        shift = torch.zeros_like(bias) if layer.bias is None else layer.bias - bias
                        decibels -= 10 * math.log10(weights_error(linear.weight, layer, shift.double(), seen))
                        graph.replace(name, module)
                    figure = decibels / len(sites)
                    found[rotation, carrier, rounding, codebook, number] = figure
                    seconds = time.process_time() - began
                    click.echo(
                        f"{rotation} {carrier} {rounding} {codebook} {number} {figure:.2f} {seconds:.1f} s", err=True
                    )
    return found


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--fit", required=True, type=click.Path(path_type=Path), help="Statistics that the codes are fitted to.")
@click.option("--judge", required=True, type=click.Path(path_type=Path), help="Statistics of other prompts.")
@click.option("--bits", "bits", multiple=True, type=int, default=(3, 4), show_default=True)
@click.option("--every", default=6, show_default=True, help="Only every n-th linear.")
@click.option("--only", multiple=True, type=click.Choice([*CODEBOOKS, AUTO]), help="Default: all but auto.")
@click.option("--carrier", "carriers", multiple=True, type=click.Choice(PRODUCTS), default=("int8",))
@click.option("--rotation", "rotations", multiple=True, type=click.Choice(list(ROTATIONS)), help="Default: all.")
def main(
    checkpoint: str,
    fit: Path,
    judge: Path,
    bits: tuple[int, ...],
    every: int,
    only: tuple[str, ...],
    carriers: tuple[str, ...],
    rotations: tuple[str, ...],
) -> None:
    opened = Checkpoint.open(checkpoint)
    fitted, judged = (Statistics.open(folder, opened.fingerprint()) for folder in (fit, judge))
    codebooks, turned = list(only or CODEBOOKS), list(rotations or ROTATIONS)
    with torch.no_grad():
        found = sqnr(opened, fitted, judged, codebooks, list(bits), turned, list(carriers), every)
    for number in bits:
        columns = list(itertools.product(turned, carriers, ROUNDINGS))
        rows = [
            [codebook, *(f"{found[(*column, codebook, number)]:.2f}" for column in columns)]
            for codebook in codebooks
            if (*columns[0], codebook, number) in found
        ]
        click.echo()
        table([f"{number} bits", *(", ".join(column) for column in columns)], rows)


if __name__ == "__main__":
    main()
