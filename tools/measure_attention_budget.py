"""Attentions chosen under a budget against one kind of attention for a share of them, at equal multiply-adds, untrained.

    python -m tools.measure_attention_budget mini --stats stats '{local_attention: {tile: 1, window: search}}'

The method is one pass that offers several parts. Both choices are made of the same measurements of single attentions, and
judged by the denoiser's guided answers on held-out calls. `fraction` takes, of each part, the attentions that alone lose least,
until the budget holds; the part that then loses least on the calls that chose is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import torch
import yaml

from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.passes import Context
from ditq.passes.attention_conversion import AttentionConversion
from ditq.passes.attention_records import answers, attached, difference
from ditq.passes.gate import HeldOutCalls, decibels
from ditq.passes.placement import LEFT, Offer, placed
from ditq.recipe import Recipe
from tools.measure_recipes import table


@click.command()
@click.argument("checkpoint")
@click.argument("method")
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option(
    "--shares", default="0.9,0.8,0.7,0.6,0.5,0.4", show_default=True, help="Budgets, of softmax's multiply-adds."
)
@torch.no_grad()
def main(checkpoint: str, method: str, stats: Path, shares: str) -> None:
    """Print a row for each budget: multiply-adds and signal to error in dB, predicted, on the calls that chose, held out."""
    opened = Checkpoint.open(checkpoint)
    context = Context(Statistics.open(stats, opened.fingerprint()))
    graph = DiTGraph(opened.load_model(), example_inputs(opened))
    judge = HeldOutCalls.of(graph.model, context.trajectories())
    step = Recipe.from_dict({"passes": [yaml.safe_load(method)]}, method).passes[0]
    assert isinstance(step, AttentionConversion)
    step = type(step)(**{**step.settings(), "macs": 0.5})  # below 1, so that each is measured alone
    measured, offers = step.offered(graph, context)
    before = sum(some[0].macs for some in offers)

    def lost(chosen: Sequence[Offer], held_out: bool) -> float:
        with ExitStack() as stack:
            for part in (offer.part for offer in chosen if offer.part is not None):
                stack.enter_context(attached(graph.model, part))
            if held_out:
                return judge.error(graph.model)
            return difference(measured.wanted, answers(graph.model, measured.batches))

    rows = []
    for share in map(float, shares.split(",")):
        try:
            chosen, _ = placed(step.name, offers, before, share, lambda _: 1.0)
        except DitqError as error:
            click.echo(str(error))
            continue
        plain = [found for name in _names(offers) if (found := _cheapest(offers, name, share * before)) is not None]
        for what, found in (
            ("macs", chosen),
            ("fraction", min(plain, key=lambda some: lost(some, False)) if plain else None),
        ):
            if found is not None:
                rows.append([f"{share:g}", what, *_cells(found, before, lost(found, False), lost(found, True))])
    table(["budget", "choice", "multiply-adds", "predicted, dB", "measured, dB", "held out, dB", "attentions"], rows)


def _names(offers: Sequence[Sequence[Offer]]) -> list[str]:
    return list(dict.fromkeys(offer.name for some in offers for offer in some[1:]))


def _cheapest(offers: Sequence[Sequence[Offer]], name: str, limit: float) -> list[Offer] | None:
    """As few attentions as the limit needs become `name`, those that alone lose least first; None where it is not reached."""
    chosen = [some[0] for some in offers]
    may = [(offer.error, place, offer) for place, some in enumerate(offers) for offer in some if offer.name == name]
    for _, place, offer in sorted(may, key=lambda item: item[:2]):
        if sum(found.macs for found in chosen) <= limit:
            break
        chosen[place] = offer
    return chosen if sum(found.macs for found in chosen) <= limit else None


def _cells(chosen: Sequence[Offer], before: int, measured: float, held_out: float) -> list[str]:
    predicted = sum(offer.error for offer in chosen)
    names = [offer.name for offer in chosen]
    counts = ", ".join(
        f"{names.count(name)} {name}" for name in sorted(set(names), key=lambda name: (name == LEFT, name))
    )
    macs = sum(offer.macs for offer in chosen) / before
    return [f"{macs:.2f}", *(f"{-decibels(error):.1f}" for error in (predicted, measured, held_out)), counts]


if __name__ == "__main__":
    main()
