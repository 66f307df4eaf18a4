"""sparse_attention takes the tiles that it says, as few as asked for, and leaves a graph that other passes work on."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from ditq.calibration.batches import CallBatch
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural.held_tiles import HeldTiles
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import token_attentions
from ditq.numerics.sparse_attention import tile_probabilities
from ditq.passes import Context, attention_conversion
from ditq.passes.attention_records import AttentionRecord, records_of
from ditq.passes.rotate import Rotate
from ditq.passes.smooth import Smooth
from ditq.passes.sparse_attention import BLOCKS, RESTS, SparseAttentionPass
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of
from tests.nn.test_token_attention import sized
from tests.passes.test_local_attention import Recorded, batches_of, recipe, run

SITE = "transformer_blocks.0.attn"


def records(graph: DiTGraph, site: str) -> list[AttentionRecord]:
    assert graph.layout is not None
    return records_of(graph.model, site, batches_of(graph), graph.layout, text=True)


def kept(graph: DiTGraph) -> dict[str, int]:
    found = {}
    for site, part in token_attentions(graph.model).items():
        assert isinstance(part, SparseAttention | HeldTiles)
        found[site] = part.keep
    return found


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_are_converted_at_the_cost_that_is_known_before(
    family: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, step = small_graph(family), SparseAttentionPass(blocks=blocks, tile=2, keep=2)
    known = {name: work.macs for name, work in step.costs(graph).items()}
    report = run(step, graph, monkeypatch)
    assert known == {name: found.macs for name, found in graph.attentions.items() if found.to_each_other}
    assert report.summary["attentions"] == len(token_attentions(graph.model)) == len(known)
    assert all(0 < row["output error"] < 2 and blocks in row["attention is"] for row in report.rows)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_and_rotation_pass_through_tiles_exactly(
    family: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_graph(family)
    run(SparseAttentionPass(blocks=blocks, tile=2, keep=2), graph, monkeypatch)
    statistics = statistics_of(graph)
    graph.model.double()
    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in small_inputs(graph.model, seed=7).items()
    }
    reference = forward(graph.model, inputs)
    weights = copy.deepcopy(graph.model.state_dict())
    Smooth(centre=True).run(graph, Context(statistics))
    Rotate(mode="hadamard", online=False).run(graph, Context(statistics))
    found = forward(graph.model, inputs)
    # As in test_folds.py: PixArt keeps a factor in float32.
    assert float((found - reference).norm() / reference.norm()) < (1e-6 if family == "pixart" else 1e-12)
    values = {site for attention in graph.attentions.values() if attention.foldable for site in attention.values}
    assert values
    for site in values:
        assert not torch.allclose(graph.model.state_dict()[f"{site}.weight"], weights[f"{site}.weight"])


def test_calibrated_tiles_are_those_with_the_most_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    expected = [
        tile_probabilities(r.query, r.key, r.grid, 2, r.scale)[0].mean(0) for r in records(graph, SITE)
    ]  # [h, T, T] each
    run(SparseAttentionPass(blocks="calibrated", tile=2, keep=3, layers=[SITE]), graph, monkeypatch)
    part = token_attentions(graph.model)[SITE]
    assert isinstance(part, SparseAttention) and part.seen is not None and part.picture == (8, 8)
    best = torch.stack(expected).mean(0).topk(3).indices
    assert torch.equal(part.seen.long().sort(-1).values, best.sort(-1).values)


def test_the_mean_of_what_is_not_seen_loses_less_than_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {}
    for rest in RESTS:
        report = run(
            SparseAttentionPass(blocks="calibrated", tile=2, keep=3, rest=rest), small_graph("flux"), monkeypatch
        )
        lost[rest] = [row["output error"] for row in report.rows]
    assert all(means < 0.1 * nothing for means, nothing in zip(lost["means"], lost["nothing"], strict=True))


@pytest.mark.parametrize("blocks", ["online", "calibrated"])
def test_mass_takes_the_least_number_that_has_it(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, tile, mass = small_graph("flux"), 2, 0.7
    found = records(graph, SITE)
    run(SparseAttentionPass(blocks=blocks, tile=tile, keep="mass", mass=mass, layers=[SITE]), graph, monkeypatch)  # type: ignore[arg-type]
    part = token_attentions(graph.model)[SITE]
    assert isinstance(part, SparseAttention)

    def seen_share(number: int) -> float:
        """Of the probability, by a brute force over all tokens of the records: what a part of so many tiles does not hide."""
        shares = []
        for r in found:
            one = SparseAttention(SITE, part.layout, part.heads, part.width, True, 0, tile, number, part.picture)
            if part.picture is not None:
                means = [tile_probabilities(o.query, o.key, o.grid, tile, o.scale)[0].mean(0) for o in found]
                assert one.seen is not None
                one.seen.copy_(torch.stack(means).mean(0).topk(number).indices)
            # Attention gives what it sees a sum of 1; the share of it in the whole is read off a value that marks keys.
            weights = (r.query @ r.key.transpose(-1, -2) * r.scale).softmax(-1)
            shown = torch.eye(r.key.shape[2]).expand(*r.key.shape[:2], -1, -1)
            visible = one.attention(r.query, r.key, shown, r.grid, r.scale) > 0
            shares.append(float(r.grid.parted((weights * visible).sum(-1, keepdim=True))[0].mean()))
        return sum(shares) / len(shares)

    assert seen_share(part.keep) >= mass > seen_share(part.keep - 1)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_search_takes_the_least_number_within_the_error(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: dict[int, dict[str, float]] = {}
    for number in (4, 6, 8, 12):
        report = run(
            SparseAttentionPass(blocks=blocks, tile=2, keep=number, rest="nothing"), small_graph("flux"), monkeypatch
        )
        errors[number] = {row["attention"]: row["output error"] for row in report.rows}
    limit = sorted(errors[8].values())[1] * 1.0001  # within reach of some with 8 tiles, of others not
    graph, step = small_graph("flux"), SparseAttentionPass(blocks=blocks, tile=2, rest="nothing", error=limit)
    run(replace(step, keep="search"), graph, monkeypatch)
    found = kept(graph)
    for site, number in found.items():
        within = [size for size in errors if errors[size][site] <= limit]
        assert number < 4 or number == within[0]
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("blocks", ["online", "calibrated"])
def test_under_a_budget_each_attention_has_a_number_of_its_own(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    step = SparseAttentionPass(blocks=blocks, tile=2, keep="search", macs=0.6)  # type: ignore[arg-type]
    report = run(step, graph, monkeypatch)
    assert len(set(kept(graph).values())) > 1
    assert 0.5 < report.summary["multiply-adds of attention, of those before"] <= 0.6


def test_as_many_tiles_as_there_are_leave_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    report = run(SparseAttentionPass(tile=4, keep=4), graph, monkeypatch)
    assert not token_attentions(graph.model) and {row["attention is"] for row in report.rows} == {
        "left, nothing to gain"
    }


def test_tiles_of_recorded_calls_of_several_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    calls = [CallBatch(sized(graph.model, *sides), torch.zeros(2, dtype=torch.int64)) for sides in ((8, 8), (6, 8))]
    monkeypatch.setattr(attention_conversion, "sampled_batches", lambda *_: calls)
    with pytest.raises(DitqError, match="recorded calls are of pictures of different sizes; calibrate at one size"):
        SparseAttentionPass(blocks="calibrated", tile=2, keep=2).run(graph, Recorded())
    SparseAttentionPass(tile=2, keep=2).run(graph, Recorded())


def test_a_model_for_pictures_of_one_size_refuses_others_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    run(SparseAttentionPass(blocks="calibrated", tile=2, keep=2), graph, monkeypatch)
    with pytest.raises(
        ValueError, match=r"attn: which tiles are seen was found for pictures of 8 x 8 tokens, not of 4 x 16"
    ):
        forward(graph.model, sized(graph.model, 4, 16))
    graph.example_inputs |= sized(graph.model, 5, 16)
    graph.refresh()  # which asks for shapes only
    assert len(graph.attentions) == 4


@pytest.mark.parametrize(
    ("family", "sides"), [("flux", (6, 10)), ("sd3", (6, 10)), ("pixart", (3, 6)), ("dit", (5, 5))]
)
def test_exact_passes_are_judged_by_pictures_of_the_calibrated_size(
    family: str, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_graph(family)
    calls = [CallBatch(sized(graph.model, *sides), torch.zeros(2, dtype=torch.int64))]
    monkeypatch.setattr(attention_conversion, "sampled_batches", lambda *_: calls)
    SparseAttentionPass(blocks="calibrated", tile=2, keep=2).run(graph, Recorded())
    assert graph.layout is not None
    grid = graph.layout.grid(graph.example_inputs)
    assert (grid.height, grid.width) == sides
    assert bool(forward(graph.model, graph.example_inputs).isfinite().all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "tile, keep and error must be above 0"),
        ({"keep": "all"}, "must be a whole number or search or mass"),
        ({"mass": 1.0}, "mass must be between 0 and 1"),
        ({"blocks": "random"}, "blocks"),
        ({"blocks": "searched", "every": 1}, "every must be at least 2"),
        ({"every": 4}, "every is for blocks: searched"),
        ({"rest": "zero"}, "rest"),
        ({"fit": 10}, "fit"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitqError) as caught:
        recipe({"sparse_attention": settings})
    assert message in str(caught.value) and "sparse_attention" in str(caught.value) and "\n" not in str(caught.value)
