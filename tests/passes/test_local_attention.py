"""local_attention converts what it selects, measures what that costs, and leaves a graph that all other passes can work on."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch

from ditq import graph
from ditq.calibration.batches import CallBatch
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.token_attention import token_attentions
from ditq.numerics.window import Window
from ditq.passes import Context, PassReport, attention_conversion
from ditq.passes.attention_conversion import AttentionConversion
from ditq.passes.attention_records import answers, difference, part_error, records_of
from ditq.passes.compress_keys import CompressKeys
from ditq.passes.linear_attention import LinearAttentionPass
from ditq.passes.local_attention import LocalAttentionPass
from ditq.passes.quantize_attention import QuantizeAttention
from ditq.passes.rotate import Rotate
from ditq.passes.smooth import Smooth
from ditq.passes.sparse_attention import SparseAttentionPass
from ditq.recipe import Recipe
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of

WITH_VIDEO = (*FAMILIES, "wan")


class Recorded(Context):
    """Stands for recorded calls: of random inputs."""

    def trajectories(self) -> Any:
        return type("Trajectories", (), {"conditions": ["one"]})()


def batches_of(graph: DiTGraph) -> list[CallBatch]:
    calls = [small_inputs(graph.model, seed=seed) for seed in range(2)]
    return [CallBatch(arguments, torch.zeros(2, dtype=torch.int64)) for arguments in calls]


def run(step: AttentionConversion, graph: DiTGraph, patch: pytest.MonkeyPatch) -> PassReport:
    batches = batches_of(graph)
    patch.setattr(attention_conversion, "sampled_batches", lambda *_: batches)
    return step.run(graph, Recorded())


def recipe(*passes: Any) -> Recipe:
    return Recipe.from_dict({"passes": list(passes)}, "recipe.yaml")


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_attentions_of_the_picture_are_converted_and_those_to_the_text_left(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_graph(family)
    expected = {found.module for found in graph.attentions.values() if found.to_each_other}
    report = run(LocalAttentionPass(window=1, tile=2, frames=1, tile_frames=2), graph, monkeypatch)
    assert set(token_attentions(graph.model)) == expected == {row["attention"] for row in report.rows}
    assert expected == {name for name in graph.attentions if not name.endswith("attn2") or family == "sd3"}
    assert report.summary["attentions"] == report.summary["of"] == len(expected)
    assert 0 < report.summary["multiply-adds of attention, of those before"] < 1
    assert all(row["output error"] > 0 for row in report.rows)


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_smoothing_and_rotation_pass_through_windows_exactly(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph(family)
    run(LocalAttentionPass(window=1, tile=2, frames=1, tile_frames=2, pool=2, fit=3), graph, monkeypatch)
    statistics = statistics_of(graph)
    graph.model.double()
    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in small_inputs(graph.model, seed=7).items()
    }
    reference = forward(graph.model, inputs)
    weights = copy.deepcopy(graph.model.state_dict())
    context = Context(statistics)
    Smooth(centre=True).run(graph, context)
    Rotate(mode="hadamard", online=False).run(graph, context)
    found = forward(graph.model, inputs)
    # As in test_folds.py: PixArt keeps a factor in float32; Wan's norms are computed in it.
    assert float((found - reference).norm() / reference.norm()) < (1e-6 if family in ("pixart", "wan") else 1e-12)
    values = {site for attention in graph.attentions.values() if attention.foldable for site in attention.values}
    assert values
    for site in values:
        changed = graph.model.state_dict()[f"{site}.weight"]
        assert not torch.allclose(changed, weights[f"{site}.weight"])


def test_search_takes_the_least_window_within_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {}
    for size in (2, 3, 4, 6):
        report = run(LocalAttentionPass(shape="circle", window=size, tile=4), small_graph("flux"), monkeypatch)
        errors[size] = {row["attention"]: row["output error"] for row in report.rows}
    limit = sorted(errors[4].values())[1] * 1.0001  # within reach of some with a radius of 4, of others not
    graph = small_graph("flux")
    run(LocalAttentionPass(shape="circle", window="search", tile=4, error=limit), graph, monkeypatch)  # type: ignore[arg-type]
    found = {}
    for name, part in token_attentions(graph.model).items():
        assert isinstance(part, LocalAttention)
        found[name] = part.windows[0].size
    for name in errors[2]:
        assert found.get(name) in [size for size in errors if errors[size][name] <= limit][:1] or name not in found
    assert set(found.values()) - {6}


def test_search_takes_the_least_frames_rows_and_columns_of_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    def wan(**settings: Any) -> dict[str, tuple[LocalAttention, dict[str, Any]]]:
        graph = small_graph("wan")  # 3 frames of 4 x 4 tokens
        report = run(LocalAttentionPass(**{"tile": 1, "tile_frames": 1, "fit": 0, **settings}), graph, monkeypatch)
        parts = token_attentions(graph.model)
        return {row["attention"]: (parts.get(row["attention"]), row) for row in report.rows}  # type: ignore[misc]

    fixed = {(size, span): wan(window=size, frames=span) for size in (1, 3) for span in (0, 1)}
    errors = sorted(row["output error"] for found in fixed.values() for _, row in found.values())
    for limit in (errors[2], errors[-3]):
        for site, (part, row) in wan(window="search", frames="search", error=limit).items():
            within = [(key, found[site][1]) for key, found in fixed.items() if found[site][1]["output error"] <= limit]
            least = min((tried["multiply-adds"] for _, tried in within), default=row["multiply-adds before"])
            assert (row["multiply-adds before"] if part is None else row["multiply-adds"]) == least
    of_all = wan(window=3, frames=0)
    assert {row["attention is"] for _, row in of_all.values()} == {"tiles 3"}


def test_heads_have_the_windows_of_least_error_that_together_need_no_more_than_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = "transformer_blocks.0.attn1"
    common: dict[str, Any] = {"layers": [site], "window": 3, "tile": 1}

    def uneven() -> DiTGraph:
        found = small_graph("dit")  # 4 x 4 tokens
        value = found.model.get_submodule(site).to_v
        value.weight[:32], value.bias[:32] = 0.3 * value.weight[:32], 0  # of one head less is lost
        return found

    (alike,) = run(LocalAttentionPass(**common), uneven(), monkeypatch).rows
    graph, step = uneven(), LocalAttentionPass(**common, heads="own")
    assert {work.macs for work in step.costs(graph).values()} == {alike["multiply-adds"]}
    (found,) = run(step, graph, monkeypatch).rows
    assert graph.layout is not None
    records = records_of(uneven().model, site, batches_of(graph), graph.layout, text=False)
    windows = [None, *(Window("tiles", size, 1) for size in (1, 2, 3))]
    tried = [LocalAttention(site, graph.layout, 2, 32, False, 0, window=both) for both in product(windows, repeat=2)]
    possible = [one for one in tried if one.macs(records[0].grid) <= alike["multiply-adds"]]
    assert found["output error"] == pytest.approx(min(part_error(one, records) for one in possible))
    assert found["multiply-adds"] <= alike["multiply-adds"] and found["output error"] < alike["output error"]
    assert found["attention is"] == "tiles 1 for 1, all for 1"


def test_a_fraction_takes_those_that_alone_cost_least(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {}
    for name in small_graph("flux").attentions:
        graph = small_graph("flux")
        wanted = answers(graph.model, batches_of(graph))
        run(LocalAttentionPass(window=1, tile=2, layers=[name]), graph, monkeypatch)
        alone[name] = difference(wanted, answers(graph.model, batches_of(graph)))
    graph = small_graph("flux")
    report = run(LocalAttentionPass(window=1, tile=2, fraction=0.5), graph, monkeypatch)
    assert set(token_attentions(graph.model)) == set(sorted(alone, key=alone.__getitem__)[:2])
    assert {row["attention"]: row["denoiser error"] for row in report.rows} == pytest.approx(alone)
    assert report.summary["attentions"] == 2


def test_a_window_over_the_whole_picture_leaves_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    report = run(LocalAttentionPass(window=3, tile=8), graph, monkeypatch)
    assert not token_attentions(graph.model) and report.summary["attentions"] == 0
    assert {row["attention is"] for row in report.rows} == {"left, nothing to gain"}


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_costs_are_known_before_anything_is_measured(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, step = small_graph(family), LocalAttentionPass(window=1, tile=2, frames=1, tile_frames=2)
    known = {name: work.macs for name, work in step.costs(graph).items()}
    run(step, graph, monkeypatch)
    assert known == {name: found.macs for name, found in graph.attentions.items() if found.to_each_other}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window and error must be above 0"),
        ({"window": "all"}, "must be a whole number or search"),
        ({"fraction": 1.5}, "fraction is 1.5, must be from 0 to 1"),
        ({"fraction": 0.0}, "fraction is 0, which converts nothing; leave the pass out"),
        ({"shape": "square"}, "shape"),
        ({"pool": -1}, "pool and frames must not be negative"),
        ({"frames": "all"}, "must be a whole number or search"),
        ({"heads": "each"}, "heads"),
        ({"tile_frames": 0}, "tile, tile_frames, window and error must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitqError) as caught:
        recipe({"local_attention": settings})
    assert message in str(caught.value) and "local_attention" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_converted_or_rounded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("pixart")
    with pytest.raises(DitqError, match=r"'\*\.attn2' matches no attention that can be converted; there are .*attn1"):
        recipe({"local_attention": {"layers": ["*.attn2"]}}).preview(graph)
    with pytest.raises(DitqError, match="'quantize_attention' cannot follow 'local_attention'"):
        recipe("local_attention", "quantize_attention").preview(graph)
    with pytest.raises(DitqError, match=r"attention takes 4\.0% of a block's .* less than 10\.0%"):
        run(LocalAttentionPass(least_share=0.1), graph, monkeypatch)
    run(LocalAttentionPass(window=1, tile=2), graph, monkeypatch)
    with pytest.raises(
        DitqError, match="attn1 is local attention by now, which is not rounded; leave it out of select"
    ):
        QuantizeAttention().run(graph, Context())
    QuantizeAttention(select=["*.attn2"]).run(graph, Context())
    with pytest.raises(DitqError, match="matches no attention that can be converted; there are none"):
        LocalAttentionPass().preview(graph)


def test_other_conversions_take_videos_too_or_say_what_they_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (
        CompressKeys(factor=2, fit=0),
        SparseAttentionPass(tile=2, keep=2),
        LinearAttentionPass(window=1, tile=2, fit=0),
    ):
        graph = small_graph("wan")
        known = {name: work.macs for name, work in step.costs(graph).items()}
        report = run(step, graph, monkeypatch)
        assert report.summary["attentions"] == len(known) == 2
        assert known == {name: found.macs for name, found in graph.attentions.items() if found.to_each_other}
    refused: list[tuple[AttentionConversion, str]] = [
        (LinearAttentionPass(locality=True), "locality is for pictures, not for videos; leave it out"),
        (SparseAttentionPass(blocks="calibrated"), "blocks: calibrated is for pictures; set online for videos"),
    ]
    for refusing, message in refused:
        with pytest.raises(DitqError, match=f"attn1: {message}") as caught:
            refusing.costs(small_graph("wan"))
        assert "\n" not in str(caught.value)


def test_a_model_of_no_family_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "family_of", lambda _: None)
    with pytest.raises(DitqError, match=r"where the picture of FluxTransformer2DModel lies .* is not known"):
        LocalAttentionPass().preview(small_graph("flux"))
