"""What sparse attentions lose along whole trajectories, so that tiles held from step to step are measured as they are used.

    python -m tools.measure_held_tiles mini --stats stats '{sparse_attention: {tile: 2, keep: 9, blocks: searched, every: 4}}'

A method is `sparse_attention` with its settings. Each attention gets what it has in the original on the recorded calls of
held-out conditions, in their order; the error is that of its outputs, relative and squared, in the mean over all of them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click
import torch
import yaml

from ditq.calibration.batches import CallBatch, held_out_conditions, sampled_batches
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn.structural.held_tiles import Turns
from ditq.passes import Context
from ditq.passes.attention_records import part_error, records_of
from ditq.passes.sparse_attention import SparseAttentionPass
from ditq.recipe import Recipe
from tools.measure_recipes import table


def as_pass(text: str) -> SparseAttentionPass:
    step = Recipe.from_dict({"passes": [yaml.safe_load(text)]}, text).passes[0]
    if not isinstance(step, SparseAttentionPass):
        raise click.ClickException(f"{text}: write sparse_attention with its settings")
    return step


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.argument("methods", nargs=-1, required=True)
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--conditions", default=2, show_default=True, help="Held-out ones, whose calls are run.")
@torch.no_grad()
def main(checkpoint: str, methods: tuple[str, ...], stats: Path, conditions: int) -> None:
    opened = Checkpoint.open(checkpoint)
    trajectories = Context(Statistics.open(stats, opened.fingerprint())).trajectories()
    graph = DiTGraph(opened.load_model(), example_inputs(opened))
    steps = {text: as_pass(text) for text in methods}
    judging = held_out_conditions(trajectories)[:conditions]
    teaching = [number for number in range(len(trajectories.conditions)) if number not in judging]
    sampled = sampled_batches(trajectories, 16, 8, 0, teaching)
    numbers = {at for at, (condition, _) in enumerate(trajectories.places_of_calls()) if condition in judging}
    calls = [CallBatch(call.arguments, torch.zeros(1, dtype=torch.int64)) for call in trajectories.calls(1, numbers)]
    found: dict[str, list[float]] = defaultdict(list)
    macs: dict[str, list[float]] = defaultdict(list)
    first = next(iter(steps.values()))
    for place in first.places(graph, sampled[0].arguments):
        site, text_too, tokens = place.site, bool(place.grid.text), place.grid.text + place.grid.image
        learned = records_of(graph.model, site, sampled, place.layout, text_too)
        records = records_of(graph.model, site, calls, place.layout, text_too)
        for text, step in steps.items():
            part = step.part(place, learned, tokens)
            if part is None:
                continue
            turns = Turns([part])
            for call, record in zip(calls, records, strict=True):
                turns.tell(call.arguments)
                found[text].append(part_error(part, [record]))
            macs[text].append(part.macs(place.grid) / (2 * part.heads * part.width * tokens**2))
    rows = [
        [text.removeprefix("{").removesuffix("}"), f"{sum(macs[text]) / len(macs[text]):.2f}",
         f"{sum(found[text]) / len(found[text]):.5f}"]
        for text in steps if found[text]
    ]  # fmt: skip
    table(["method", "multiply-adds", "output error"], rows)


if __name__ == "__main__":
    main()
