"""quantize chooses how inputs are quantized: one format an input, searched where asked, settings checked in one line."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ditq.calibration.statistics import Statistics
from ditq.errors import DitqError
from ditq.export import load_engine, prove_fusion, site_agreement
from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.numerics.activation_clip import CLIPS
from ditq.passes import Context
from ditq.passes.activation_formats import ActivationSettings
from ditq.passes.quantize import Quantize, quantized_layers
from ditq.recipe import Recipe
from tests.export.quantized import engine_of, relative
from tests.families_small import forward, small_graph, small_inputs, statistics_of


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


def test_a_scale_a_group_is_searched_for_by_group_and_loses_less() -> None:
    sites = ["kind:query", "kind:feed_forward_out"]
    errors = {}
    for activation in ("token", "group"):
        for clip in (False, True):
            settings = {"activation": activation, "activation_clip": clip, "select": sites}
            if activation == "group":
                settings["activation_group"] = 16
            graph, rows = _quantized(format="w4a4", activation_grid="midrise", **settings)
            for site, layer in quantized_layers(graph.model).items():
                assert layer.activation.granularity == activation and layer.activation.clip in CLIPS
                found = _statistics().groups[graph.sites[site].group].sample
                lost = (layer.activation.rounded(found) - found).double().square()
                energy = small_graph("dit").linear(site).weight.double().square().sum(0)
                expected = (lost * energy).sum() / (found.double().square() * energy).sum()
                if clip:
                    assert rows[site]["input error"] == pytest.approx(float(expected), rel=1e-4)
                errors[activation, clip, site] = float(expected)
    for (activation, clip, site), error in errors.items():
        if activation == "group":
            assert (
                error < errors["token", clip, site] and errors[activation, True, site] <= errors["group", False, site]
            )


def test_an_fp8_carrier_takes_the_levels_and_the_inputs_of_its_sites_alone() -> None:
    rule = {"select": "*.to_q", "carrier": "float8_e4m3"}
    graph, _ = _quantized(
        format="w4a8", group_size=16, refine=1, rules=[rule, {**rule, "format": "w4a16", "select": "*.to_v"}]
    )
    layers = [graph.linear(f"transformer_blocks.0.attn1.{name}") for name in ("to_q", "to_k", "to_v")]
    grids, dtypes = [], []
    for layer in layers:
        assert isinstance(layer, QuantLinear)
        grids.append(layer.activation.grid if layer.activation.bits == 8 else "")
        dtypes.append(layer.carrier().dtype)
    assert grids == ["float8_e4m3", "symmetric", ""]
    assert dtypes == [torch.float8_e4m3fn, torch.int8, torch.float8_e4m3fn]
    assert Quantize(carrier="float8_e4m3").preview(graph)["transformer_blocks.0.ff.net.2"] == (
        "w4a8 twin_log_shared gptq float8_e4m3"
    )


def test_an_engine_of_fp8_weights_holds_them_as_such(tmp_path: Path) -> None:
    sites = ["kind:query", "kind:key"]
    rules = [{"select": "kind:key", "format": "w8a16"}]
    graph, _ = _quantized(format="w4a16", carrier="float8_e4m3", select=sites, rules=rules)
    engine, inputs = engine_of(graph.model, tmp_path / "engine"), small_inputs(graph.model)
    assert {spec["carrier"] for spec in engine.sites.values()} == {"float8_e4m3"}
    stored = load_file(engine.folder / "weights.safetensors")
    key, query = (f"transformer_blocks.0.attn1.{name}" for name in ("to_k.codes", "to_q.table"))
    assert stored[key].dtype == stored[query].dtype == torch.float8_e4m3fn
    expected = forward(graph.model, inputs)
    assert torch.equal(load_engine(engine.folder, target="torch")(**inputs, return_dict=False)[0], expected)
    assert relative(load_engine(engine.folder)(**inputs, return_dict=False)[0], expected) < 1e-5


def test_groups_of_channels_must_divide_the_inputs_that_are_quantized() -> None:
    graph, wide = small_graph("dit"), "transformer_blocks.0.ff.net.2"
    inputs = graph.sites[wide].in_features
    step = Quantize(activation="group", activation_group=graph.sites[wide].in_features, select=[wide])
    assert step.plan(graph)[wide].activation_group == inputs
    step = replace(step, select=["kind:query"])
    with pytest.raises(DitqError, match=f"activation_group {inputs} does not divide its 64 inputs"):
        step.plan(graph)
    float_inputs = {"select": "kind:query", "format": "w4a16"}
    assert replace(step, rules=[float_inputs]).plan(graph)  # inputs that are not quantized have no groups


def test_inspect_tells_what_is_not_as_usual() -> None:
    graph = small_graph("dit")
    site = "transformer_blocks.0.attn1.to_q"
    found = Quantize(format="w4a4", activation_grid="midrise", activation_clip=True).preview(graph)[site]
    assert found == "w4a4 twin_log_shared gptq midrise clipped"
    grouped = Quantize(format="w4a8", activation="group", activation_group=16).preview(graph)[site]
    assert grouped == "w4a8 twin_log_shared gptq a scale for 16 channels"
    assert Quantize(rank=8).preview(graph)[site] == "w4a8 twin_log_shared gptq rank 8"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_grid": "midrize"}, "did you mean 'midrise'"),
        ({"activation_grid": "midrise"}, "at most 7 bits"),
        ({"activation": "tensor", "activation_unsigned": "auto"}, "set activation: token"),
        ({"activation": "group", "activation_unsigned": "auto"}, "set activation: token"),
        ({"activation_group": 32}, "activation_group is for activation: group"),
        ({"activation": "group", "activation_group": 0}, "must be 1 or more"),
        ({"activation": "groups"}, "did you mean 'group'"),
        ({"carrier": "float8"}, "did you mean 'float8_e4m3'"),
        ({"carrier": "float8_e4m3", "format": "w4a4"}, "w4a4 has 4; set carrier: int8"),
        ({"carrier": "float8_e4m3", "activation_unsigned": "auto"}, "leave activation_unsigned out"),
        ({"carrier": "float8_e4m3", "rank": 4}, "set branch: float"),
        ({"activation_unsigned": "yes"}, "activation_unsigned"),
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


# --- unsigned


def _linear_error(layer: QuantLinear, site: str) -> float:
    """Squared error of the output on the sampled rows, over its square, the weights' own part taken out by 8 bits."""
    linear, x = small_graph("dit").linear(site), _statistics().groups[site].sample
    expected = linear(x)
    return float((layer(x) - expected).square().sum() / expected.square().sum())


def test_unsigned_codes_are_taken_where_they_lose_less_and_the_report_says_so() -> None:
    behind, before = "transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn1.to_q"
    settings = {"format": "w8a5", "select": [behind, before]}
    graph, rows = _quantized(**settings, activation_unsigned="auto")
    layer, other = graph.linear(behind), graph.linear(before)
    assert isinstance(layer, QuantLinear) and isinstance(other, QuantLinear)
    assert layer.activation.grid == rows[behind]["grid"] == "unsigned" and other.activation.grid == "symmetric"
    assert layer.activation.shift == rows[behind]["shift"] == -float(_statistics().groups[behind].sample.min())
    assert 0.1 < layer.activation.shift < 0.1701  # the least value of a GELU
    plain, plain_rows = _quantized(**settings)
    assert rows[behind]["input error"] < 0.95 * plain_rows[behind]["input error"]
    signed = plain.linear(behind)
    assert isinstance(signed, QuantLinear)
    assert _linear_error(layer, behind) < 0.6 * _linear_error(signed, behind)


def test_unsigned_codes_are_taken_where_they_are_asked_for() -> None:
    graph, _ = _quantized(format="w8a8", activation_unsigned="always", select=["kind:query"])
    layer = graph.linear("transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, QuantLinear) and layer.activation.grid == "unsigned"
    # 255 steps of the range from the least value to the token's largest, in all channels: an error of 1e-3 or less
    assert _linear_error(layer, "transformer_blocks.0.attn1.to_q") < 1e-3


# --- a scale a timestep bin


def _binned(**metadata: Any) -> Statistics:
    """Of two steps in two bins: inputs of the second are three times those of the first."""
    early, late = _statistics(), {}
    for name, found in early.groups.items():
        scales = {"moments": 9.0, "total": 3.0, "absmax": 3.0, "sample": 3.0, "sample_bin": 0.0}
        later = replace(found, **{key: getattr(found, key) * factor for key, factor in scales.items()})
        joined = {
            item.name: torch.cat((getattr(found, item.name), getattr(later, item.name))) for item in fields(found)
        }
        joined["sample_bin"] = (torch.arange(2 * len(found.sample)) >= len(found.sample)).long()
        late[name] = replace(found, **joined)
    return Statistics(late, early.sites, {**early.metadata, "bins": 2, **metadata})


def _by_timestep(statistics: Statistics, family: str = "dit", **settings: Any) -> DiTGraph:
    graph = small_graph(family)
    changed = {"codebook": "uniform", "rounding": "nearest", "activation": "timestep", **settings}
    Recipe.from_dict({"passes": [{"quantize": changed}]}, "test").passes[0].run(graph, Context(statistics))
    return graph


def test_each_timestep_bin_has_the_scale_of_its_own_largest_value() -> None:
    statistics = _binned(timestep_arguments=[900.0, 100.0])
    graph = _by_timestep(statistics, format="w4a8")
    for site, layer in quantized_layers(graph.model).items():
        largest = _statistics().groups[graph.sites[site].group].absmax.max()
        assert layer.activation_scale is not None and layer.activation.edges == (500.0,)
        torch.testing.assert_close(layer.activation_scale, torch.stack((largest, 3 * largest)) / 127)


def test_a_call_of_the_model_takes_the_scales_of_its_timestep() -> None:
    graph = _by_timestep(_binned(timestep_arguments=[900.0, 100.0]), format="w4a4", activation_grid="midrise")
    inputs = small_inputs(graph.model)
    model, layers = graph.model, quantized_layers(graph.model)
    with pytest.raises(ValueError, match="run the whole model"):
        next(iter(layers.values()))(torch.zeros(1, 64))
    for number, timestep in enumerate((700, 499)):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        found = forward(model, inputs)
        fixed = small_graph("dit")
        for site, layer in layers.items():
            spec = layer.spec()
            spec["activation"] = {**spec["activation"], "granularity": "tensor", "edges": []}
            again = QuantLinear.from_spec(spec)
            assert layer.activation_scale is not None
            again.load_state_dict({**layer.state_dict(), "activation_scale": layer.activation_scale[number]})
            fixed.replace(site, again)
        assert torch.equal(found, forward(fixed.model, inputs))


def test_an_engine_takes_the_scales_of_its_timestep(tmp_path: Path) -> None:
    graph = _by_timestep(_binned(timestep_arguments=[900.0, 100.0]), format="w4a8", activation_clip=True)
    engine = engine_of(graph.model, tmp_path / "engine")
    assert prove_fusion(engine).complete
    inputs = small_inputs(graph.model)
    for timestep in (700, 499):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        errors = site_agreement(engine, inputs)
        assert len(errors) == len(quantized_layers(graph.model)) and max(errors.values()) < 1e-5
        # the torch target was rebuilt from the engine alone; a rounding may fall to the other side on the way
        expected = forward(graph.model, inputs)
        assert torch.equal(load_engine(engine.folder, target="torch")(**inputs, return_dict=False)[0], expected)
        assert relative(load_engine(engine.folder)(**inputs, return_dict=False)[0], expected) < 1e-2


def test_one_bin_is_one_scale_a_tensor() -> None:
    found = _statistics()
    graph = _by_timestep(replace(found, metadata={**found.metadata, "timestep_arguments": [900.0]}), format="w4a8")
    assert {layer.activation.granularity for layer in quantized_layers(graph.model).values()} == {"tensor"}


def test_timestep_scales_need_to_know_the_timesteps() -> None:
    with pytest.raises(DitqError, match=r"lack some .*; set activation: token"):
        _by_timestep(_binned(), format="w4a8")
    with pytest.raises(DitqError, match="do not fall along"):
        _by_timestep(_binned(timestep_arguments=[100.0, 900.0]), format="w4a8")
    with pytest.raises(DitqError, match="needs a model with an argument called timestep"):
        ActivationSettings(activation="timestep").check_model(["hidden_states"])
