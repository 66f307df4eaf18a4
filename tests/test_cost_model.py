"""The cost model counts what the formulas of the papers say, takes over what passes say, and predicts a lower bound in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from ditq.cost_model import Costs, Device, costs_after, costs_before, this_processor
from ditq.errors import DitqError
from ditq.families import SIDE, family_of
from ditq.formats import BitFormat
from ditq.graph import DiTGraph
from ditq.inspection import _side
from ditq.parts import Work
from ditq.passes import Context, PassReport
from ditq.passes.base import Pass
from ditq.recipe import Recipe
from tests.families_small import FAMILIES, small_graph, small_model


@dataclass(frozen=True)
class Eighths(Pass):
    """Says that every second linear of a feed-forward became 8 experts of an eighth, of which a token gets two."""

    name: ClassVar[str] = "eighths"

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        return PassReport(self.name, {})

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        sites = [graph.sites[feed_forward.output.site] for feed_forward in graph.feed_forwards.values()]
        return {
            s.name: Work("feed-forward", s.macs // 4, s.parameters + 8, s.parameters // 4 + 8, s.tokens, 3)
            for s in sites
        }


@dataclass(frozen=True)
class Halves(Pass):
    """Says that of everything in blocks half is left."""

    name: ClassVar[str] = "halves"

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        return PassReport(self.name, {})

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        works = {name: work for name, work in costs_before(graph).works.items() if work.part != "rest"}
        return {
            name: Work(w.part, w.macs // 2, w.parameters // 2, w.activated // 2, w.moved // 2)
            for name, w in works.items()
        }


def test_a_plain_block_costs_what_the_formulas_say() -> None:
    """DiT: N tokens, width D, ratio 4: 4 N D^2 projections, 8 N D^2 feed-forward, 2 N^2 D scores, 6 D^2 modulation a block."""
    graph = small_graph("dit")
    blocks, n, d = 2, 16, 64
    costs = costs_before(graph)
    assert costs.macs["token linears"] == blocks * 4 * n * d * d
    assert costs.macs["feed-forward"] == blocks * 8 * n * d * d
    assert costs.macs["attention scores"] == blocks * 2 * n * n * d
    assert costs.macs["modulation"] == blocks * 6 * d * d
    assert costs.attention_share == pytest.approx(n / (n + 6 * d))
    assert costs.parameters == costs.activated == sum(p.numel() for p in graph.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_and_attention_is_counted_once(family: str) -> None:
    graph = small_graph(family)
    macs = [site.macs for site in graph.sites.values()] + [found.macs for found in graph.attentions.values()]
    assert sum(costs_before(graph).macs.values()) == sum(macs)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_tokens_can_be_asked_for(family: str) -> None:
    """The linears of the longest sequence see as many image tokens as were asked for."""
    model = small_model(family)
    known = family_of(type(model).__name__)
    assert known is not None
    found = []
    for side in (8, 16):
        graph = DiTGraph(model, known.example_inputs({**model.config, SIDE: side}, 2, 0))
        found.append(max(site.tokens for site in graph.sites.values() if site.role == "token"))
    text = {"flux": 16}.get(family, 0)  # single blocks have text and image in one
    assert found == [64 + text, 256 + text]
    with pytest.raises(DitqError, match="square number"):
        _side(60)
    assert _side(64) == 8


def test_what_a_pass_says_takes_the_place_of_what_was() -> None:
    graph = small_graph("dit")
    before, after = costs_before(graph), costs_after(graph, Recipe("test", "", (Eighths(),)))
    n, d = 16, 64
    assert before.macs["feed-forward"] - after.macs["feed-forward"] == 2 * 3 * n * d * d
    assert after.parameters == before.parameters + 2 * 8
    assert after.activated == after.parameters - 2 * 3 * d * d
    assert after.macs["token linears"] == before.macs["token linears"]


def test_passes_on_the_same_linears_add_up_in_any_order() -> None:
    graph = small_graph("dit")
    before = costs_before(graph)
    pair, half = Recipe("test", "", (Eighths(), Halves())), Recipe("test", "", (Halves(),))
    for passes in (pair.passes, pair.passes[::-1]):
        after = costs_after(graph, Recipe("test", "", passes))
        assert (
            after.macs["feed-forward"]
            == costs_after(graph, Recipe("test", "", pair.passes[:1])).macs["feed-forward"] // 2
        )
        assert after.macs["attention scores"] == before.macs["attention scores"] // 2
        assert after.parameters < costs_after(graph, half).parameters + 2 * 8
    quarter = costs_after(graph, Recipe("test", "", (Halves(), Halves())))
    assert quarter.macs["feed-forward"] == before.macs["feed-forward"] // 4
    assert quarter.parameters < costs_after(graph, half).parameters < before.parameters


def test_the_time_is_the_slower_of_products_and_memory_plus_the_start_of_each_operation() -> None:
    """By hand: a product of 1e9 multiply-adds at 1e12 a second; 8e6 4-bit weights at 1e9 bytes a second; two starts."""
    device = Device("made up", {16: 1e12, 8: 2e12}, 1e9, 1e-5, "nowhere")
    works = {"busy": Work("token linears", 10**9, 1000, 1000, 1000), "large": Work("modulation", 10**6, 8 * 10**6)}
    assert Costs(works, 0).seconds(device) == pytest.approx(1e-3 + 16e-3 + 2e-5)
    coded = Costs(works, 0, {"busy": BitFormat(8, 8), "large": BitFormat(4, 16)})
    assert coded.seconds(device) == pytest.approx(0.5e-3 + 4e-3 + 2e-5)


def test_this_processor_is_measured() -> None:
    found = this_processor()
    assert found.source == "measured here"
    assert all(1e7 < peak < 1e14 for peak in found.peaks.values())
    assert 1e7 < found.bandwidth < 1e13 and 0 < found.launch < 1e-2
