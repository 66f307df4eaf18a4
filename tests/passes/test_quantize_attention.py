"""quantize_attention rounds the attentions that it selects, wherever it stands in a recipe, and refuses what makes no sense."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.calibration.batches import CallBatch
from ditq.calibration.calibrate import calibrate
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn import AttentionRounding, describe, rebuild
from ditq.nn.attention_rounding import attach
from ditq.numerics.attention_rounding import AttentionFormat, rounded_attention, turned
from ditq.passes import Context
from ditq.passes.block_records import call
from ditq.passes.quantize_attention import QuantizeAttention
from ditq.recipe import Recipe
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model
from tests.small_checkpoint import write_pipeline

ATTENTIONS = {
    "flux": ["transformer_blocks.*.attn", "single_transformer_blocks.*.attn"],
    "sd3": ["transformer_blocks.*.attn", "transformer_blocks.0.attn2"],
    "pixart": ["transformer_blocks.*.attn1", "transformer_blocks.*.attn2"],
    "dit": ["transformer_blocks.*.attn1"],
}


class Replaced:
    """Within it torch's own attention is `with_what`: what the module's processor calls, without hooks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, form: AttentionFormat) -> None:
        self.calls = 0

        def attention(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **keywords: Any
        ) -> Tensor:
            self.calls += 1
            scale = keywords.get("scale") or query.shape[-1] ** -0.5
            return rounded_attention(query, key, value, attn_mask, scale, form)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_of_a_family_is_rounded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph(family)
    plain = forward(graph.model, inputs := small_inputs(graph.model))
    report = QuantizeAttention().run(graph, Context())
    found = forward(graph.model, inputs)
    assert {row["attention"] for row in report.rows} == set(graph.attentions)
    assert not torch.equal(found, plain)
    replaced = Replaced(monkeypatch, AttentionFormat(rotate=True))
    assert torch.equal(forward(small_model(family), inputs), found)
    assert replaced.calls == len(graph.attentions)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rebuilt_model_and_a_copy_give_the_same_bits(family: str) -> None:
    graph = small_graph(family)
    QuantizeAttention(format="float8_e4m3", parts="qkp", smooth_keys=False).run(graph, Context())
    inputs = small_inputs(graph.model, seed=4)
    expected = forward(graph.model, inputs)
    fresh = small_model(family, seed=1)
    rebuild(fresh, json.loads(json.dumps(describe(graph.model))), graph.model.state_dict())
    copied = copy.deepcopy(graph.model)
    assert torch.equal(forward(fresh, inputs), expected) and torch.equal(forward(copied, inputs), expected)
    assert describe(fresh) == describe(graph.model) == describe(copied)
    # The copy has roundings of its own.
    for module in copied.modules():
        if isinstance(module, AttentionRounding):
            module.form = AttentionFormat("int8", "v")
    assert torch.equal(forward(graph.model, inputs), expected) and not torch.equal(forward(copied, inputs), expected)


def test_only_what_the_patterns_name_is_rounded() -> None:
    graph = small_graph("pixart")
    report = QuantizeAttention(select=["*.attn2"]).run(graph, Context())
    chosen = ["transformer_blocks.0.attn2", "transformer_blocks.1.attn2"]
    assert [row["attention"] for row in report.rows] == chosen and report.summary["attentions"] == 2
    assert [module.site for module in graph.model.modules() if isinstance(module, AttentionRounding)] == chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_preview_names_the_linears_of_the_attention(family: str) -> None:
    graph = small_graph(family)
    plan = QuantizeAttention(parts="qk").preview(graph)
    assert set(plan.values()) == {"attention int8 qk"}
    kinds = {kind for site in plan for kind in graph.sites[site].kind.split("+")}
    assert {"query", "key", "value"} <= kinds


def recipe(*passes: Any) -> Recipe:
    return Recipe.from_dict({"passes": list(passes)}, "recipe.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": "qx"}, "letters of qkvpo, each once, not 'qx'"),
        ({"parts": ""}, "letters of qkvp"),
        ({"parts": "qq"}, "letters of qkvp"),
        ({"format": "int4"}, "int4"),
        ({"parts": "po"}, "round v as well"),
        ({"scales": "static"}, "static scales are three positive numbers for float8_e4m3"),
        ({"scales": "calibrated"}, "calibrated"),
        ({"scales": "static", "format": "float8_e4m3", "margin": 0.5}, "margin 0.5 is below 1"),
        ({"scales": "static", "format": "float8_e4m3", "margin": 1e6}, "margin 1e+06 is above 1024"),
        ({"part": "q"}, "no setting 'part'; did you mean 'parts'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitqError) as caught:
        recipe({"quantize_attention": settings})
    assert message in str(caught.value) and "quantize_attention" in str(caught.value) and "\n" not in str(caught.value)


def test_the_rotation_of_queries_and_keys_is_counted() -> None:
    graph = small_graph("pixart")
    inputs = small_inputs(graph.model)
    cross = next(found for found in graph.attentions.values() if "attn2" in found.name)
    text = inputs["encoder_hidden_states"].shape[1]
    width, size = cross.heads * cross.head_width, cross.head_width
    step = QuantizeAttention(select=[cross.module])
    assert step.runtime_cost(graph) == ((cross.tokens + text) * width * size,) * 2
    assert QuantizeAttention(select=[cross.module], rotate=False).runtime_cost(graph) == (0, 0)
    assert QuantizeAttention().runtime_cost(graph)[0] > step.runtime_cost(graph)[0]


def test_a_pattern_that_matches_nothing_and_a_second_rounding_are_refused() -> None:
    graph = small_graph("dit")
    with pytest.raises(DitqError, match=r"'\*\.attn7' matches no attention; there are transformer_blocks\.0\.attn1, "):
        recipe({"quantize_attention": {"select": ["*.attn7"]}}).preview(graph)
    with pytest.raises(DitqError, match="cannot follow 'quantize_attention'"):
        recipe("quantize_attention", {"quantize_attention": {"parts": "v"}}).preview(graph)
    recipe({"quantize_attention": {"select": ["*.0.*"]}}, {"quantize_attention": {"select": ["*.1.*"]}}).preview(graph)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_it_may_stand_before_or_behind_the_other_passes(place: int) -> None:
    steps: list[Any] = [{"rotate": {"mode": "block_hadamard"}}, "quantize"]
    plan = recipe(*steps[:place], "quantize_attention", *steps[place:]).preview(small_graph("flux"))
    assert "attention int8 qkvp" in plan["transformer_blocks.0.attn.to_q"]


class Causal(nn.Module):
    """Two blocks, one of which looks back only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in range(2))

    def forward(self, hidden_states: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        x = hidden_states
        for number, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleList)
            q, k, v = (linear(x).unflatten(-1, (2, 4)).transpose(1, 2) for linear in list(block)[:3])
            y = F.scaled_dot_product_attention(q, k, v, is_causal=number == 1)
            x = x + block[3](y.transpose(1, 2).flatten(2))
        return (x,)


def test_causal_attention_is_refused_before_and_while_it_runs() -> None:
    model = Causal()
    inputs = {"hidden_states": torch.randn(2, 5, 8)}
    with pytest.raises(DitqError, match="is causal or shares keys between heads; leave it out of select"):
        QuantizeAttention().preview(DiTGraph(model, inputs))
    attach(model, "model", AttentionFormat())
    with pytest.raises(ValueError, match="neither causal"):
        model(**inputs)
    # The failed call has left nothing behind.
    found = F.scaled_dot_product_attention(*(torch.randn(1, 1, 3, 4) for _ in range(3)), is_causal=True)
    assert found.shape == (1, 1, 3, 4)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Context]:
    """A context with one recorded call, of these arguments."""

    def context(arguments: dict[str, Any]) -> Context:
        batch = type("Batch", (), {"arguments": arguments})()
        monkeypatch.setattr(Context, "has_trajectories", True)
        monkeypatch.setattr(Context, "trajectories", lambda self: None)
        monkeypatch.setattr("ditq.passes.quantize_attention.sampled_batches", lambda *_: [batch])
        return Context()

    return context


def test_static_scales_are_those_of_the_largest_recorded_numbers(recorded: Callable[..., Context]) -> None:
    graph = small_graph("sd3")
    arguments = small_inputs(graph.model)
    seen: list[list[float]] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **keywords: Any) -> Tensor:
        seen.append([float(x.abs().max()) for x in (turned(query), turned(key), value)])
        return plain(query, key, value)

    plain = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        forward(graph.model, arguments)
    settings: dict[str, Any] = {"format": "float8_e4m3", "parts": "qkvpo", "scales": "static", "smooth_keys": False}
    step = QuantizeAttention(**settings, margin=2.0)
    assert step.requires_statistics and not QuantizeAttention().requires_statistics
    report = step.run(graph, recorded(arguments))
    found = [module.form for module in graph.model.modules() if isinstance(module, AttentionRounding)]
    expected = [[2 * x / 448 for x in largest] for largest in seen]
    ordered = [torch.tensor(sorted(scales)) for scales in ([list(form.scales) for form in found], expected)]
    torch.testing.assert_close(*ordered)
    assert all(0 < row["output error"] < 0.02 and row["scales"].count(",") == 2 for row in report.rows)
    fresh = small_model("sd3", seed=1)
    rebuild(fresh, json.loads(json.dumps(describe(graph.model))), graph.model.state_dict())
    assert torch.equal(forward(fresh, arguments), forward(graph.model, arguments))


def test_the_error_of_each_attention_is_measured_on_recorded_calls(recorded: Callable[..., Context]) -> None:
    graph = small_graph("dit")
    arguments = small_inputs(graph.model)
    report = QuantizeAttention().run(graph, recorded(arguments))
    first = report.rows[0]["output error"]

    seen: list[tuple[Tensor, Tensor]] = []
    rounding = next(module for module in graph.model.modules() if isinstance(module, AttentionRounding))
    assert rounding.watch is None
    rounding.watch = lambda y, exact: seen.append((y, exact))
    forward(graph.model, arguments)
    y, exact = seen[0]
    assert first == pytest.approx(float((y - exact).square().sum() / exact.square().sum()), rel=1e-4)
    assert 0 < first < 1e-3  # 8 bits: each part is off by at most 1/254 of its largest


def test_calls_that_are_measured_are_of_one_step_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears with a scale a timestep bin take that of the first sample of a call."""
    checkpoint = Checkpoint.open(write_pipeline(tmp_path / "pipeline"))
    statistics = calibrate(checkpoint, tmp_path / "stats", ["red apple", "blue fish"], 3, progress=False)
    steps: list[Tensor] = []

    def watched_call(model: nn.Module, batch: CallBatch) -> Any:
        steps.append(batch.steps)
        return call(model, batch)

    monkeypatch.setattr("ditq.passes.quantize_attention.call", watched_call)
    graph = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))
    step = QuantizeAttention(format="float8_e4m3", parts="qkvpo", scales="static", smooth_keys=False)
    with torch.no_grad():
        step.run(graph, Context(statistics))
    assert len(torch.cat(steps).unique()) == 3
    assert all(len(found.unique()) == 1 for found in steps)
