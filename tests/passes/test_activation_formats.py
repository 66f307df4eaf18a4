"""quantize chooses how inputs are quantized: one format an input, searched where asked, settings checked in one line."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ditq.calibration.statistics import Statistics
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.numerics.activation_clip import CLIPS
from ditq.passes import Context
from ditq.passes.quantize import Quantize, quantized_layers
from ditq.recipe import Recipe
from tests.families_small import small_graph, statistics_of


@functools.cache
def _statistics() -> Statistics:
    return statistics_of(small_graph("dit"))


def _quantized(**settings: Any) -> tuple[DiTGraph, dict[str, dict[str, Any]]]:
    """The graph, and the report's row of each site."""
    graph = small_graph("dit")
    step = Recipe.from_dict({"passes": [{"quantize": settings}]}, "test").passes[0]
    report = step.run(graph, Context(_statistics()))
    return graph, {row["site"]: row for row in report.rows}


def test_linears_of_one_input_share_its_format() -> None:
    graph, rows = _quantized(format="w4a4", activation_grid="midrise", activation_clip=True)
    layers = quantized_layers(graph.model)
    for group in graph.groups.values():
        found = {layers[site].activation for site in group.sites if site in layers}
        assert len(found) <= 1
        assert all(form.grid == "midrise" and form.clip in CLIPS for form in found)
    assert any(layer.activation.clip < 1 for layer in layers.values())
    assert all(rows[site].get("clip", 1) == layer.activation.clip for site, layer in layers.items())


def test_a_rule_gives_a_linear_an_input_of_its_own() -> None:
    rule = {"select": "*.to_q", "activation_grid": "symmetric", "format": "w4a8"}
    graph, _ = _quantized(format="w4a4", activation_grid="midrise", rules=[rule])
    query, key = (graph.linear(f"transformer_blocks.0.attn1.{name}") for name in ("to_q", "to_k"))
    assert isinstance(query, QuantLinear) and isinstance(key, QuantLinear)
    assert (query.activation.bits, query.activation.grid) == (8, "symmetric")
    assert (key.activation.bits, key.activation.grid) == (4, "midrise")


def test_the_reported_error_is_that_of_the_sampled_rows_on_their_way_through_the_layer() -> None:
    site = "transformer_blocks.0.ff.net.2"
    graph, rows = _quantized(format="w8a4", activation_clip=True, select=[site])
    sample, layer = _statistics().groups[site].sample.double(), graph.linear(site)
    assert isinstance(layer, QuantLinear)
    top = sample.abs().amax(1, keepdim=True) * layer.activation.clip
    lost = (sample / top * 7).round().clamp(-7, 7) * top / 7 - sample
    energy = small_graph("dit").linear(site).weight.double().square().sum(0)
    expected = (lost.square() * energy).sum() / (sample.square() * energy).sum()
    assert rows[site]["input error"] == pytest.approx(float(expected), rel=1e-5)


def test_few_bits_lose_less_with_all_levels_and_a_searched_range() -> None:
    errors = {}
    for grid in ("symmetric", "midrise"):
        for clip in (False, True):
            rows = _quantized(format="w4a4", activation_grid=grid, activation_clip=clip)[1]
            errors[grid, clip] = sum(row["input error"] for row in rows.values())
    assert errors["midrise", True] < errors["midrise", False] < errors["symmetric", False]
    assert errors["symmetric", True] < errors["symmetric", False]


def test_inspect_tells_what_is_not_as_usual() -> None:
    graph = small_graph("dit")
    site = "transformer_blocks.0.attn1.to_q"
    found = Quantize(format="w4a4", activation_grid="midrise", activation_clip=True).preview(graph)[site]
    assert found == "w4a4 twin_log_shared gptq midrise clipped"
    assert Quantize(rank=8).preview(graph)[site] == "w4a8 twin_log_shared gptq rank 8"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_grid": "midrize"}, "did you mean 'midrise'"),
        ({"activation_grid": "midrise"}, "at most 7 bits"),
        ({"format": "w4a4", "rules": [{"select": "*", "activation_clip": 1}]}, "must be true or false"),
        ({"format": "w4a4", "activation_grid": "midrise", "rules": [{"select": "*", "format": "w8a8"}]}, "w8a8 has 8"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitqError, match=message) as caught:
        Recipe.from_dict({"passes": [{"quantize": settings}]}, "test")
    assert len(str(caught.value).splitlines()) == 1


def test_formats_of_inputs_come_back_from_an_engine_and_old_engines_have_the_plain_ones() -> None:
    graph, _ = _quantized(format="w4a4", activation_grid="midrise", activation_clip=True, select=["kind:query"])
    layer = graph.linear("transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, QuantLinear)
    again = QuantLinear.from_spec(layer.spec())
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), layer(x))
    old = QuantLinear.from_spec({**layer.spec(), "activation": {"bits": 8, "granularity": "token"}})
    assert old.activation.grid == "symmetric" and old.activation.clip == 1
