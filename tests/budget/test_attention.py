"""A budget of attention: the cheapest loss within it, by brute force; where it is set; what cannot be met says so."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ditq.budget.attention import within
from ditq.budget.request import Budget
from ditq.errors import DitqError
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.token_attention import token_attentions
from ditq.passes.attention_records import answers, difference
from ditq.passes.local_attention import LocalAttentionPass
from ditq.passes.placement import KEPT, Offer, PlacementReport, placed
from ditq.recipe import Recipe, load_recipe
from tests.families_small import small_graph
from tests.passes.test_local_attention import batches_of, run


def made_up(seed: int) -> list[list[Offer]]:
    """Attentions that may become one of several things, of different numbers."""
    generator = np.random.default_rng(seed)
    return [
        [Offer("softmax", 100, 0.0)]
        + [
            Offer(f"window {size}", int(generator.integers(5, 95)), float(10.0 ** -generator.integers(1, 6)))
            for size in range(1 + number % 3)
        ]
        for number in range(5)
    ]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_within_the_budget_loses_less(seed: int, share: float) -> None:
    offers = made_up(seed)
    allowed = [
        (sum(offer.error for offer in choice), choice)
        for choice in itertools.product(*offers)
        if sum(offer.macs for offer in choice) <= share * 500
    ]
    if not allowed:
        with pytest.raises(DitqError, match=r"need at least 0\.\d+ of the multiply-adds .*, more than 0\.\d"):
            placed("local_attention", offers, 500, share, lambda _: 1.0)
        return
    chosen, front = placed("local_attention", offers, 500, share, lambda _: 1.0)
    assert sum(offer.error for offer in chosen) == pytest.approx(min(allowed, key=lambda item: item[0])[0], rel=1e-5)
    (point,) = (row for row in front if row["chosen"])
    assert point[KEPT] == sum(offer.macs for offer in chosen) / 500 <= share
    assert [row[KEPT] for row in front] == sorted(row[KEPT] for row in front)


def test_the_pass_chooses_windows_and_says_what_they_lose_together(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    wanted = answers(graph.model, batches_of(graph))
    step = LocalAttentionPass(shape="circle", window="search", tile=2, macs=0.7)  # type: ignore[arg-type]
    report = run(step, graph, monkeypatch)
    assert isinstance(report, PlacementReport)
    assert report.summary[KEPT] <= 0.7
    parts = token_attentions(graph.model)
    sizes = {site: part.windows[0].size for site, part in parts.items() if isinstance(part, LocalAttention)}
    assert 0 < len(sizes) == report.summary["attentions"] <= 4
    assert {row["attention"]: row["attention is"] for row in report.rows} == {
        row["attention"]: f"circle {sizes[row['attention']]}" if row["attention"] in sizes else "softmax"
        for row in report.rows
    }
    found = 10 * np.log10(difference(wanted, answers(graph.model, batches_of(graph))))
    assert report.summary["measured error, dB"] == pytest.approx(found, abs=1e-3)
    spent = sum(row["multiply-adds"] for row in report.rows)
    assert report.summary[KEPT] == spent / sum(row["multiply-adds before"] for row in report.rows)


def test_where_attention_is_little_of_a_block_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    step = LocalAttentionPass(window=1, tile=2, macs=0.7)
    for small, expected in ((0.99, 1), (0.0, 0)):
        monkeypatch.setattr("ditq.passes.attention_conversion.SMALL_SHARE", small)
        report: Any = run(step, small_graph("dit"), monkeypatch)
        assert len(report.notes) == expected
    assert "of a block's multiply-adds at 4 x 4 tokens" in run_notes(step, monkeypatch)


def run_notes(step: LocalAttentionPass, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("ditq.passes.attention_conversion.SMALL_SHARE", 0.99)
    report: Any = run(step, small_graph("dit"), monkeypatch)
    return " ".join(report.notes)


def recipe(*passes: Any, **others: Any) -> Recipe:
    return Recipe.from_dict({"passes": list(passes), **others}, "recipe.yaml")


def macs_of(found: Recipe) -> Sequence[tuple[str, Any]]:
    return [(step.name, step.settings().get("macs")) for step in found.passes]


def test_the_budget_is_set_on_the_pass_that_converts_or_windows_are_put_in_front() -> None:
    budget = Budget.parse("attention_macs=0.3")
    found = within(recipe({"compress_keys": {"factor": 2}}, {"quantize": {"format": "w4a8"}}), budget)
    assert macs_of(found) == [("compress_keys", 0.3), ("quantize", None)]
    front = within(load_recipe("w4a8"), budget).passes[0]
    assert isinstance(front, LocalAttentionPass) and (front.macs, front.window) == (0.3, "search")
    written = recipe({"local_attention": {"window": "search"}}, budget="attention_macs=0.3")
    assert macs_of(written) == [("local_attention", 0.3)] and written.budget is None


@pytest.mark.parametrize(("passes", "says"), [
    ([{"local_attention": {"layers": ["a"]}}, {"linear_attention": {}}], "all convert attentions; .* set macs in each"),
    ([{"local_attention": {"fraction": 0.5}}], "macs and fraction both choose attentions; set one of them"),
])  # fmt: skip
def test_a_budget_that_is_not_clear_is_refused(passes: list[Any], says: str) -> None:
    with pytest.raises(DitqError, match=says):
        within(recipe(*passes), Budget.parse("attention_macs=0.3"))


@pytest.mark.parametrize(("text", "says"), [
    ("attention_macs=1", "must be below 1"), ("attention_macs>=0.3", "takes = or <="), ("attention_macs=0", "above 0"),
    ("attention_macs=3MB", "takes no unit"),
])  # fmt: skip
def test_a_share_of_attention_is_below_1(text: str, says: str) -> None:
    with pytest.raises(DitqError, match=says):
        Budget.parse(text)
    assert str(Budget.parse("attention_macs<=0.25")) == "attention_macs=0.25"
    with pytest.raises(DitqError, match="candidates are formats of linears"):
        Budget.parse("attention_macs=0.25", "w3,w4")
