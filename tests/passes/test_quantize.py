"""quantize: every shipped recipe runs on every family, loses less the more bits it has, and does what its rules say."""

from __future__ import annotations

import functools
import itertools
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.statistics import Statistics
from ditq.calibration.step_weights import StepWeights
from ditq.errors import DitqError
from ditq.formats import BitFormat
from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.passes import Context
from ditq.passes.quantize import Quantize, quantized_layers, stored_bits
from ditq.passes.reconstruct import Reconstruct
from ditq.passes.site_settings import SiteSettings
from ditq.recipe import DEFAULT, Recipe, load_recipe, shipped_recipes
from ditq.site_cache import FolderSiteCache
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model, statistics_of

QUICK = {"rounding": "nearest", "codebook": "uniform", "weighted": False, "bias_correction": False}


def _error(reference: torch.Tensor, output: torch.Tensor) -> float:
    return float((reference.double() - output.double()).norm() / reference.double().norm())


@functools.cache
def _statistics(family: str) -> Statistics:
    return statistics_of(small_graph(family))


@functools.cache
def _error_of(recipe: str, family: str) -> float:
    """Relative error of the output on inputs that the statistics have not seen, mean of several."""
    graph = small_graph(family)
    inputs = [small_inputs(graph.model, seed=seed) for seed in range(9, 13)]
    references = [forward(graph.model, given) for given in inputs]
    context = Context(_statistics(family))
    for step in load_recipe(recipe).passes:
        if not isinstance(step, Reconstruct):  # which learns from recorded calls; there are none of random models
            step.run(graph, context)
    wanted = {site.name for site in graph.sites.values() if site.role in ("token", "modulation")}
    assert set(quantized_layers(graph.model)) == wanted
    pairs = zip(references, inputs, strict=True)
    return sum(_error(reference, forward(graph.model, given)) for reference, given in pairs) / len(inputs)


def _pairs() -> list[tuple[str, str]]:
    """Every recipe with a family in turns, the default with all."""
    number = len(FAMILIES)
    return [
        (recipe, FAMILIES[(place + step) % number])
        for place, recipe in enumerate(shipped_recipes())
        for step in range(number if recipe == DEFAULT else 1)
    ]


@pytest.mark.parametrize(("recipe", "family"), _pairs())
def test_shipped_recipes_run_and_lose_little(recipe: str, family: str) -> None:
    # Plain rounding of normal values, whose maximum is about 4 times their RMS: a step of 4 / 2^(b-1), an error of
    # step / sqrt(12); those of weights and activations are independent. Much of the output comes down the residual stream
    # past every quantized product, so that all of them together stay near the error of one.
    form = next(step.format for step in load_recipe(recipe).passes if isinstance(step, Quantize))
    bits = BitFormat.parse(form)
    one = sum((4 / 2 ** (b - 1) / 12**0.5) ** 2 for b in (bits.weight, bits.activation)) ** 0.5
    assert _error_of(recipe, family) < 1.5 * one


@pytest.mark.parametrize("family", ["sd3", "dit"])
def test_more_bits_lose_less(family: str) -> None:
    errors = {name: _error_of(name, family) for name in ("w8a8", "w4a8", "w3a8", "w4a4")}
    assert errors["w8a8"] < errors["w4a8"] < errors["w3a8"]
    assert errors["w4a8"] < errors["w4a4"]


def test_step_weights_say_which_timesteps_codes_are_fitted_to() -> None:
    """A bin of weight 0 is as good as absent: the very codes and biases of statistics that never had it."""
    first, second = (
        statistics_of(small_graph("dit"), inputs=[small_inputs(small_model("dit"), seed=s)]) for s in (0, 1)
    )
    groups = {}
    for name, found in first.groups.items():
        other = second.groups[name]
        parts = [(getattr(found, item.name), getattr(other, item.name)) for item in fields(InputStatistics)]
        joined = InputStatistics(*(torch.cat(pair) for pair in parts))
        groups[name] = replace(joined, sample_bin=torch.cat([found.sample_bin, other.sample_bin + 1]))
    metadata = {**first.metadata, "bins": 2}
    both = Statistics(groups, first.sites, metadata, StepWeights(effect=(1.0, 1.0), share=(2.0, 0.0)))
    made = {}
    for key, statistics, kind in (("first", first, "none"), ("share", both, "share"), ("effect", both, "effect")):
        graph = small_graph("dit")
        Quantize(step_weights=kind).run(graph, Context(statistics))
        made[key] = {name: layer.state_dict() for name, layer in quantized_layers(graph.model).items()}
    assert all(torch.equal(made["share"][n][k], v) for n, state in made["first"].items() for k, v in state.items())
    assert any(not torch.equal(made["effect"][n]["codes"], state["codes"]) for n, state in made["first"].items())
    with pytest.raises(DitqError, match="hold no step weights"):
        Quantize(step_weights="share").run(small_graph("dit"), Context(first))
    with pytest.raises(DitqError, match="step_weights weighs second moments, which nothing here reads"):
        Quantize(**QUICK, step_weights="share").check()  # type: ignore[arg-type]


def _one_linear(settings: dict[str, object], seed: int = 0) -> tuple[DiTGraph, dict[str, float]]:
    graph = small_graph("dit")
    step = Recipe.from_dict({"passes": [{"quantize": settings}]}, "test").passes[0]
    report = step.run(graph, Context(_statistics("dit"), seed))
    return graph, {row["site"]: row["output error"] for row in report.rows if "output error" in row}


def test_the_output_error_halves_twice_with_every_bit() -> None:
    """One bit halves the step, so the squared error falls to about a quarter: between a half and a tenth is accepted."""
    site = "transformer_blocks.0.attn1.to_q"
    found = [
        _one_linear({"format": f"w{bits}a16", "codebook": "uniform", "select": [site]})[1][site] for bits in range(2, 9)
    ]
    for coarse, fine in itertools.pairwise(found):
        assert 0.1 * coarse < fine < 0.5 * coarse


@pytest.mark.parametrize("codebook", ["uniform", "twin_log", "twin_log_shared"])
def test_gptq_loses_less_than_rounding_to_nearest(codebook: str) -> None:
    errors = [
        _one_linear({"format": "w3a16", "codebook": codebook, "rounding": rounding})[1]
        for rounding in ("gptq", "nearest")
    ]
    assert sum(errors[0].values()) < sum(errors[1].values())


def test_bias_correction_takes_the_mean_error_out_of_the_output() -> None:
    site = "transformer_blocks.1.ff.net.2"
    means = {}
    for corrected in (True, False):
        graph = small_graph("dit")
        statistics = _statistics("dit")
        linear = graph.linear(site)
        assert isinstance(linear, nn.Linear)
        mean = statistics.groups[site].mean()
        Quantize(format="w3a16", select=[site], bias_correction=corrected).run(graph, Context(statistics))
        means[corrected] = (linear(mean) - graph.linear(site)(mean)).abs().max()
    assert means[True] < 1e-5 * linear(mean).abs().max() < means[False]


# --- rules


def _formats(rules: list[dict[str, object]], **settings: object) -> dict[str, str]:
    """Site -> its format, for the first block of a small DiT."""
    graph = small_graph("dit")
    step = Recipe.from_dict({"passes": [{"quantize": {**QUICK, **settings, "rules": rules}}]}, "test").passes[0]
    step.run(graph, Context())
    prefix = "transformer_blocks.0."
    layers = quantized_layers(graph.model)
    found = {name: f"w{layer.bits}a{layer.activation.bits}" for name, layer in layers.items()}
    assert {n: layer.site for n, layer in layers.items()} == {n: n for n in layers}
    return {name.removeprefix(prefix): form for name, form in found.items() if name.startswith(prefix)}


def test_keep_leaves_a_linear_in_full_precision() -> None:
    found = _formats([{"select": "kind:feed_forward_out", "keep": True}])
    assert "ff.net.2" not in found and found["ff.net.0.proj"] == "w4a8"


def test_a_later_rule_wins_and_overrides_only_what_it_names() -> None:
    rules: list[dict[str, object]] = [
        {"select": "transformer_blocks.0.attn1.*", "format": "w8a8", "group_size": 32},
        {"select": ["*.to_q", "*.to_k"], "format": "w3a16"},
        {"select": "*.attn1.*", "keep": True},
        {"select": "*.to_v", "keep": False},
    ]
    assert _formats(rules) == {"attn1.to_v": "w8a8", "ff.net.0.proj": "w4a8", "ff.net.2": "w4a8"}
    assert _formats(rules[:2])["attn1.to_q"] == "w3a16"
    assert _formats(rules[1::-1])["attn1.to_q"] == "w8a8"
    graph = small_graph("dit")
    Quantize(**QUICK, rules=rules[:2]).run(graph, Context())
    query, key = (graph.linear(f"transformer_blocks.{i}.attn1.to_q") for i in (0, 1))
    assert query.scale.shape == (64, 2) and key.scale.dim() == 1  # the first rule's groups stay, in block 0 alone


def test_a_rule_may_add_linears_that_the_pass_does_not_select() -> None:
    found = _formats([{"select": "role:modulation", "format": "w8a16"}], select=["kind:query"])
    assert found == {"attn1.to_q": "w4a8", "norm1.linear": "w8a16"}


def test_a_rule_that_asks_for_gptq_or_static_activations_asks_for_statistics() -> None:
    plain = Quantize(**QUICK)
    assert not plain.requires_statistics
    for rule in ({"rounding": "gptq"}, {"activation": "tensor"}, {"activation_clip": True}):
        asking = Quantize(**QUICK, rules=[{"select": "kind:query", **rule}])
        assert asking.requires_statistics
        with pytest.raises(DitqError, match="needs calibration statistics"):
            asking.run(small_graph("dit"), Context())


def test_static_activations_take_the_largest_value_that_calibration_saw() -> None:
    graph = small_graph("dit")
    statistics = _statistics("dit")
    site = "transformer_blocks.0.attn1.to_q"
    Quantize(format="w8a6", activation="tensor", select=[site]).run(graph, Context(statistics))
    layer = graph.linear(site)
    assert isinstance(layer, QuantLinear) and layer.activation.granularity == "tensor"
    assert layer.activation_scale is not None
    assert float(layer.activation_scale) == pytest.approx(float(statistics.groups[site].absmax_all.max()) / 31)


def test_the_report_counts_the_bits_that_are_stored() -> None:
    graph = small_graph("dit")
    report = Quantize(**{**QUICK, "format": "w4a8"}).run(graph, Context())
    for row in report.rows:
        layer = graph.linear(row["site"])
        weights = layer.in_features * layer.out_features
        # 4 bits a weight, a float32 scale a row, an int8 table of 16 levels.
        assert stored_bits(layer) == 4 * weights + 32 * layer.out_features + 8 * 16 == row["bits a weight"] * weights
    assert report.summary["linears"] == len(report.rows) == 12


# --- low-rank branches


def test_a_branch_loses_less_and_comes_back_from_the_cache_of_a_resumed_run(tmp_path: Path) -> None:
    site = "transformer_blocks.0.attn1.to_q"
    layers, errors = {}, {}
    for rank in (0, 8, 8):
        graph, cache = small_graph("dit"), FolderSiteCache(tmp_path, {"rank": rank})
        report = Quantize(format="w3a8", rank=rank, select=[site]).run(graph, Context(_statistics("dit"), 0, cache))
        before, layers[rank] = layers.get(rank), graph.linear(site)
        errors[rank] = report.rows[0]["output error"]
    assert errors[8] < 0.8 * errors[0]
    assert before is not None and before.spec() == layers[8].spec()
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), layers[8].buffers(), strict=True))
    # int8 factors [8, 64] and [64, 8] and a float32 scale a row of the first
    assert stored_bits(layers[8]) - stored_bits(layers[0]) == 8 * 2 * 8 * 64 + 32 * 8


def test_a_damping_that_had_to_be_raised_is_reported_by_a_resumed_run_too(tmp_path: Path) -> None:
    site, graph, cache = "transformer_blocks.0.attn1.to_q", small_graph("dit"), FolderSiteCache(tmp_path, {})
    statistics = statistics_of(graph, forwards=1)
    group = graph.sites[site].group
    seen = statistics.groups[group]
    statistics.groups[group] = replace(seen, moments=seen.second_moment - 0.3 * seen.count * torch.eye(seen.width))
    for _ in range(2):
        graph = small_graph("dit")
        report = Quantize(select=[site]).run(graph, Context(statistics, 0, cache))
        assert report.rows[0]["damping raised to"] == pytest.approx(1.0)
    assert (
        "damping raised to" not in Quantize(select=[site]).run(small_graph("dit"), Context(_statistics("dit"))).rows[0]
    )


def test_a_float_branch_spares_its_part_of_the_input_the_rounding() -> None:
    """At 4 bits the rounding of the input is most of the error; without a branch that no bit of the weight can change."""
    site = "transformer_blocks.0.attn1.to_q"
    statistics = _statistics("dit")
    x = statistics.groups[site].sample
    errors = {}
    for settings in ({"rank": 0}, {"rank": 32, "branch": "integer"}, {"rank": 32, "branch": "float"}):
        graph = small_graph("dit")
        expected = graph.linear(site)(x)
        Quantize(format="w4a4", select=[site], **settings).run(graph, Context(statistics))
        errors[settings.get("branch", "")] = _error(expected, graph.linear(site)(x))
    assert errors["float"] < 0.8 * errors["integer"] < errors[""]


def test_a_share_is_a_rank_of_the_shorter_side() -> None:
    """Of 192 and 3072 channels 2 % are 3.8 and 61.4; products want multiples of 8."""
    few = SiteSettings(rank_share=0.02)
    assert few.ranked(192, 768).rank == few.ranked(768, 192).rank == 4
    assert few.ranked(12288, 3072).rank == 64 and few.ranked(16, 16).rank == 1
    assert replace(few, rank_share=0.0, rank=3).ranked(192, 192).rank == 3
    graph = small_graph("flux")
    step = Quantize(rank_share=0.1, rules=[{"select": "kind:query", "rank_share": 0}])
    for site, settings in step.plan(graph).items():
        found = graph.sites[site]
        shorter = min(found.in_features, found.out_features)
        assert settings.rank == (0 if found.kind == "query" else round(0.1 * shorter)) and not settings.rank_share


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank is -1, must be a whole number, 0 for none"),
        ({"rank": 65}, "a rank of 65 is above its width, 64"),
        ({"rank_share": 1.5}, "rank_share is 1.5, must be from 0 to 1"),
        ({"rank": 2, "rank_share": 0.1}, "must be from 0 to 1, and 0 where rank is given"),
        ({"rules": [{"select": "*", "rank_share": "few"}]}, "rank_share is 'few', must be a number"),
        ({"rules": [{"select": "*", "rank": "low"}]}, "rank is 'low', must be a whole number"),
        ({"rules": [{"select": "*", "branch": "int"}]}, "branch"),
    ],
)
def test_ranks_and_branches_that_cannot_be_are_refused_before_anything_runs(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DitqError, match=message):
        Recipe.from_dict({"passes": [{"quantize": settings}]}, "test").passes[0].preview(small_graph("dit"))


# --- rounding beyond GPTQ


def test_refining_and_searching_scales_lose_less_than_gptq_alone() -> None:
    base: dict[str, object] = {"format": "w3a16", "codebook": "twin_log_shared"}
    gptq = sum(_one_linear(base)[1].values())
    searched = sum(_one_linear({**base, "scale_search": 3})[1].values())
    refined = sum(_one_linear({**base, "refine": 4})[1].values())
    assert searched < gptq and refined < gptq
    assert _one_linear({**base, "refine": 4})[1] == _one_linear({**base, "refine": 4})[1]


def _lost(settings: dict[str, object], site: str = "transformer_blocks.1.ff.net.2") -> float:
    """Squared error of one layer's output, with its input quantized too, on the rows that the statistics sampled."""
    graph, statistics = small_graph("dit"), _statistics("dit")
    linear, x = graph.linear(site), statistics.groups[site].sample
    expected = linear(x)
    Quantize(**{"select": [site], **settings}).run(graph, Context(statistics))
    return float((graph.linear(site)(x) - expected).detach().square().sum())


def test_weights_for_rounded_inputs_lose_less_of_them() -> None:
    # few bits for the input, many for the weight: what is lost is the input's
    settings: dict[str, object] = {"format": "w8a4", "codebook": "uniform"}
    assert _lost({**settings, "activation_noise": True}) < _lost(settings)


def test_a_hessian_without_the_mean_loses_less_where_the_bias_takes_it() -> None:
    settings: dict[str, object] = {"format": "w3a16", "codebook": "uniform"}
    assert _lost({**settings, "centred": True}) < _lost(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refine": -1}, "refine is -1, must be 0 or more"),
        ({"scale_search": -2}, "scale_search is -2, must be 0 or more"),
        ({"refine": 2, "rounding": "nearest"}, "refine works on what GPTQ rounds"),
        ({"activation_noise": True, "rounding": "nearest"}, "activation_noise works on what GPTQ rounds"),
        ({"centred": True, "bias_correction": False}, "centred leaves the mean to bias_correction"),
        ({"activation_noise": True, "rank": 4, "branch": "float"}, "set branch: integer"),
        ({"activation_noise": True, "branch": "float", "rules": [{"select": "*", "rank": 4}]}, "set branch: integer"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(DitqError, match=words):
        Recipe.from_dict({"passes": [{"quantize": settings}]}, "test")
