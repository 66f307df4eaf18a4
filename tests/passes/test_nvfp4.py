"""The format nvfp4 in a recipe: what it makes of linears, what does not go with it, which targets take it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ditq.budget.choices import candidate_settings
from ditq.calibration.statistics import Statistics
from ditq.errors import DitqError
from ditq.export.targets import targets
from ditq.formats import BitFormat
from ditq.graph import DiTGraph
from ditq.nn import ActivationFormat, QuantLinear
from ditq.nn.learned_linear import LearnedLinear
from ditq.numerics.carrier import FLOAT4, INT8
from ditq.passes import Context
from ditq.passes.judging import Judge
from ditq.passes.quantize import Quantize, quantized_layers
from ditq.passes.site_settings import SiteSettings
from ditq.recipe import Recipe
from tests.export.quantized import relative
from tests.families_small import forward, small_graph, small_inputs, statistics_of

FORM = ActivationFormat(4, "tensor", "float4_e2m1", group_size=16)


@functools.cache
def statistics() -> Statistics:
    return statistics_of(small_graph("dit"))


def step_of(**settings: Any) -> Quantize:
    step = Recipe.from_dict({"passes": [{"quantize": settings}]}, "test").passes[0]
    assert isinstance(step, Quantize)
    return step


@functools.cache
def quantized() -> tuple[DiTGraph, dict[str, dict[str, Any]]]:
    """The graph with modulation as w4a16, and the report's row of each site."""
    graph = small_graph("dit")
    rule = {"select": "role:modulation", "format": "w4a16", "codebook": "uniform", "group_size": 32}
    report = step_of(format="nvfp4", refine=1, rules=[rule]).run(graph, Context(statistics()))
    return graph, {row["site"]: row for row in report.rows}


def test_a_linear_gets_fp4_numbers_on_both_sides_and_a_rule_another_format() -> None:
    graph, rows = quantized()
    kinds = set()
    for site, layer in quantized_layers(graph.model).items():
        kinds.add(rows[site]["format"])
        if rows[site]["format"] != "nvfp4":
            assert layer.carrier_kind is INT8 and layer.activation == ActivationFormat()
            continue
        assert layer.carrier_kind is FLOAT4 and layer.codebook == "e2m1" and layer.activation == FORM
        assert layer.multiplier is not None and layer.multiplier.dtype == torch.float8_e4m3fn
        assert layer.multiplier.shape == (layer.out_features, layer.in_features // 16)
        largest = statistics().groups[graph.sites[site].group].absmax_all.max()
        assert layer.activation_scale is not None
        torch.testing.assert_close(layer.activation_scale, (largest / 2688).float())
        # 4 bits, 8 for a block of 16, 32 for a row; a table of 16 numbers in bytes
        extra = (32 * layer.out_features + 8 * 16) / (layer.in_features * layer.out_features)
        assert rows[site]["bits a weight"] == pytest.approx(4.5 + extra)
    assert kinds == {"nvfp4", "w4a16"}


def test_the_model_is_near_the_original_and_comes_back_from_what_is_stored() -> None:
    graph, _ = quantized()
    model = graph.model
    inputs = small_inputs(model)
    found = forward(model, inputs)
    assert relative(found, forward(small_graph("dit").model, inputs)) < 0.3
    for layer in quantized_layers(model).values():
        again = QuantLinear.from_spec(layer.spec())
        again.load_state_dict(layer.state_dict())
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        transform = layer.transform
        assert transform is None and torch.equal(again(x), layer(x))


@pytest.mark.parametrize(("settings", "says"), [
    ({"group_size": 32}, "nvfp4 has blocks of 16, not 32; leave group_size out"),
    ({"codebook": "lloyd_max"}, "nvfp4 has levels of its own, e2m1, not lloyd_max; leave codebook out"),
    ({"carrier": "float8_e4m3"}, "nvfp4 has numbers and scales of its own; leave carrier out, or set carrier: int8"),
    ({"activation": "timestep"}, "leave activation out, or set activation: token"),
    ({"activation_grid": "midrise"}, "leave activation_grid out, or set activation_grid: symmetric"),
    ({"activation_clip": True}, "leave activation_clip out, or set activation_clip: false"),
    ({"rank": 4}, "a branch of int8 rows cannot read inputs on the carrier float4_e2m1; set branch: float"),
    ({"format": "nvfp8"}, "unknown format 'nvfp8'; write .* or nvfp4"),
    ({"carrier": "float4_e2m1", "format": "w4a4"}, "carrier.*float4_e2m1"),
])  # fmt: skip
def test_settings_that_do_not_go_with_it_are_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DitqError, match=says) as caught:
        step_of(**{"format": "nvfp4", **settings})
    assert len(str(caught.value).splitlines()) == 1


def test_its_own_settings_may_be_written_out() -> None:
    step_of(format="nvfp4", group_size=16, codebook="e2m1")


def test_widths_that_blocks_do_not_divide_are_named() -> None:
    with pytest.raises(DitqError, match=r"blocks\.0\.proj: nvfp4 has blocks of 16, which do not divide its 24 inputs"):
        SiteSettings(format="nvfp4").settled().check_width("blocks.0.proj", 24)


def test_one_target_multiplies_it_and_the_others_say_what_to_do() -> None:
    plan = step_of(format="nvfp4").plan(small_graph("dit"))["transformer_blocks.0.attn1.to_q"]
    for name, target in targets().items():
        if name in ("tensorrt", "torch"):
            continue
        with pytest.raises(DitqError, match=f"{name} has no product of float4_e2m1 numbers; set another format"):
            target.check_product("a", plan.carrier, plan.bits)
    targets()["tensorrt"].check_product("a", plan.carrier, plan.bits)


def test_a_budget_does_not_choose_bits_for_it() -> None:
    with pytest.raises(DitqError, match="budget: chooses bits of weights, which nvfp4 fixes"):
        candidate_settings(SiteSettings(format="nvfp4"), "w3", next(iter(small_graph("flux").sites.values())))


def test_rotations_are_judged_by_its_own_numbers() -> None:
    judge = Judge("nvfp4", "twin_log_shared", "nearest")
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(judge.rounded(x), FORM.rounded(x, FORM.scale(x.abs().max())))
    fit = judge.fit(x, torch.eye(32))
    assert fit.table.dtype == FLOAT4.dtype and fit.group_size == 16
    assert str(BitFormat.parse("nvfp4")) == "w4a4"


def test_learning_starts_from_the_code_and_stays_in_the_format() -> None:
    graph, _ = quantized()
    site = "transformer_blocks.0.ff.net.2"
    layer, weight = graph.linear(site), small_graph("dit").linear(site).weight
    assert isinstance(layer, QuantLinear) and isinstance(weight, torch.Tensor)
    learned = LearnedLinear(layer, weight.detach())
    torch.testing.assert_close(learned.weight(), layer.weight(), rtol=1e-5, atol=1e-7)
    torch.nn.init.normal_(learned.table, std=3)
    code = learned.code()
    assert set(code.table.float().abs().tolist()) <= {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
    assert code.table.dtype == FLOAT4.dtype
