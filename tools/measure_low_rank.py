"""Layer output error and bits a weight with low-rank branches of several ranks, beside other uses of the same bits.

    python -m tools.measure_low_rank mini --stats stats
    python -m tools.measure_low_rank mini --stats stats --pictures 8

The error is that of the quantized layer on sampled rows of its input, activations quantized too, in dB, averaged over
linears; `pictures` draws with the variants that matter and compares with the original's pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn import QuantLinear
from ditq.passes import Context
from ditq.passes.folding import plain_linear
from ditq.recipe import Recipe
from tools.measure_recipes import MODULATION, Bench, table

RANKS = (8, 16, 32)


def variants(form: str) -> dict[str, dict[str, Any]]:
    """Settings of `quantize` by name; ranks first, then what else the bits could buy."""
    finer = f"w{int(form[1]) + 1}{form[2:]}"
    found: dict[str, dict[str, Any]] = {"rank 0": {}}
    found |= {f"rank {rank}, integer": {"rank": rank} for rank in RANKS}
    found |= {f"rank {rank}, float": {"rank": rank, "branch": "float"} for rank in RANKS}
    return found | {
        "groups of 64": {"group_size": 64},
        "groups of 16": {"group_size": 16},
        "a table a row": {"codebook": "twin_log"},
        f"one bit more ({finer})": {"format": finer},
        "groups of 64, rank 32, float": {"group_size": 64, "rank": 32, "branch": "float"},
    }


def steps(form: str, settings: dict[str, Any], modulation: bool) -> list[Any]:
    rules = {"rules": [{**MODULATION, "rank": 0}]} if modulation else {}
    return [{"smooth": {}}, {"rotate": {"mode": "hadamard"}}, {"quantize": {"format": form, **settings, **rules}}]


def layer_errors(checkpoint: Checkpoint, statistics: Statistics, form: str, every: int) -> list[list[str]]:
    """One row a variant: bits a weight and the mean over linears of the output's signal-to-noise ratio."""
    graph, context = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint)), Context(statistics)
    for step in Recipe.from_dict({"passes": steps(form, {}, False)[:2]}, "measured").passes:
        step.run(graph, context)
    sites = [name for name, site in graph.sites.items() if site.role == "token"][::every]
    original: dict[str, tuple[Any, Tensor, Tensor]] = {}
    for name in sites:
        linear, x = plain_linear(graph, name), context.statistics(graph.sites[name].group).sample
        original[name] = (graph.linear(name), x, x @ linear.weight.T)
    rows = []
    for variant, settings in variants(form).items():
        recipe = Recipe.from_dict({"passes": [{"quantize": {"format": form, "select": sites, **settings}}]}, "measured")
        report = recipe.passes[0].run(graph, context)
        ratios = []
        for name, (module, x, expected) in original.items():
            layer = graph.linear(name)
            assert isinstance(layer, QuantLinear)
            layer.transform, layer.bias = None, None  # the sample is that of the transformed input
            layer_error = (layer(x) - expected).square().sum() / expected.square().sum()
            ratios.append(-10 * float(layer_error.log10()))
            graph.replace(name, module)
        codes = sum(-10 * float(torch.tensor(row["output error"]).log10()) for row in report.rows) / len(report.rows)
        bits, mean = report.summary["bits a weight"], sum(ratios) / len(ratios)
        rows.append([form, variant, f"{bits:.2f}", f"{codes:.2f}", f"{mean:.2f}"])
    return rows


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--format", "forms", multiple=True, default=("w4a4", "w3a8", "w4a8"), show_default=True)
@click.option("--every", default=7, show_default=True, help="Only every n-th linear: a fair sample takes minutes.")
@click.option("--pictures", default=0, help="Held-out prompts to draw instead.")
@click.option("--only", multiple=True, help="Variants to draw; default: all.")
def main(
    checkpoint: str, stats: Path, forms: tuple[str, ...], every: int, pictures: int, only: tuple[str, ...]
) -> None:
    opened = Checkpoint.open(checkpoint)
    statistics = Statistics.open(stats, opened.fingerprint())
    if not pictures:
        rows = [row for form in forms for row in layer_errors(opened, statistics, form, every)]
        table(["format", "variant", "bits a weight", "weights alone, dB", "layer, dB"], rows)
        return
    bench, rows = Bench(opened, pictures, 1000), []
    for form in forms:
        for name, settings in variants(form).items():
            if not only or name in only:
                model, bits = bench.passes(steps(form, settings, True), statistics)
                rows.append([form, name, f"{bits:.2f}", *(f"{value:.2f}" for value in bench.quality(model))])
                click.echo(" ".join(rows[-1]), err=True)
    table(["format", "variant", "bits a weight", "PSNR, dB", "worst"], rows)


if __name__ == "__main__":
    main()
