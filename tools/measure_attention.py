"""What attentions of less than quadratic cost lose untrained, by how many are converted: the denoiser on held-out calls.

    python -m tools.measure_attention mini --stats stats '{local_attention: {shape: circle, window: 3, tile: 4}}'

A method is one pass with its settings. Attentions are converted in the order of what each alone does to the denoiser's output.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import click
import torch
import yaml

from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn.structural.token_attention import attach
from ditq.passes import Context
from ditq.passes.attention_conversion import AttentionConversion
from ditq.passes.gate import HeldOutCalls, decibels
from ditq.recipe import Recipe
from tools.measure_recipes import table

SHARES = (0.25, 0.5, 0.75, 1.0)


@click.command()
@click.argument("checkpoint")
@click.argument("methods", nargs=-1, required=True)
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@torch.no_grad()
def main(checkpoint: str, methods: tuple[str, ...], stats: Path) -> None:
    """Print one row for each of METHODS: signal to error of guided answers in dB, for each share of the attentions."""
    opened = Checkpoint.open(checkpoint)
    context = Context(Statistics.open(stats, opened.fingerprint()))
    original = DiTGraph(opened.load_model(), example_inputs(opened))
    judge = HeldOutCalls.of(original.model, context.trajectories())
    rows = []
    for method in methods:
        step = Recipe.from_dict({"passes": [yaml.safe_load(method)]}, method).passes[0]
        assert isinstance(step, AttentionConversion)
        graph = copy.deepcopy(original)
        found, _ = replace(step, fraction=0.5).candidates(graph, context)  # below 1, so that each is measured alone
        made = sorted((item for item in found if item[1] is not None), key=lambda item: item[0]["denoiser error"])
        macs = sum(row["multiply-adds"] for row, _ in made) / sum(row["multiply-adds before"] for row, _ in made)
        output = sum(row["output error"] for row, _ in made) / len(made)
        cells, done = [], 0
        for share in SHARES:
            for _, part in made[done : round(share * len(found))]:
                assert part is not None
                attach(graph.model, part)
            done = min(round(share * len(found)), len(made))
            cells.append(f"{-decibels(judge.error(graph.model)):.1f}")
        rows.append([method.removeprefix("{").removesuffix("}"), f"{macs:.2f}", f"{output:.3f}", *cells])
    table(["method", "multiply-adds", "output error", *(f"{share:.0%}, dB" for share in SHARES)], rows)


if __name__ == "__main__":
    main()
