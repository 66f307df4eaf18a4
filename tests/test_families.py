"""Families beyond the four that every pass is tested on: what is folded is exact, and their graphs run low-bit."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from ditq.export import model_agreement
from ditq.export.fusion import prove_fusion
from ditq.export.onnx_graph import _choose_by_logic
from ditq.parts import LinearModulation, TableModulation
from ditq.pass_pipeline import run_passes
from ditq.recipe import Recipe
from tests.export.quantized import engine_of, quantize_blocks, shallow_model
from tests.families_small import OTHERS, forward, small_graph, small_inputs, statistics_of

FOLDS = {"passes": [{"smooth": {"alpha": 0.5, "centre": True}}, {"rotate": {"mode": "block_hadamard", "block": 32}}]}


@pytest.mark.parametrize("family", OTHERS)
def test_folds_leave_the_function_unchanged(family: str) -> None:
    graph = small_graph(family)
    inputs = small_inputs(graph.model, seed=7)
    expected = forward(graph.model, inputs)
    run_passes(graph, Recipe.from_dict(FOLDS, "test"), statistics_of(graph, inputs=[inputs]))
    assert float((forward(graph.model, inputs) - expected).norm() / expected.norm()) < 1e-5


def test_modulation_that_blocks_share_belongs_to_none_of_them() -> None:
    """FLUX.2's three modulation linears feed all blocks, Chroma's are slices of one network's output."""
    for family in ("flux2", "chroma"):
        graph = small_graph(family)
        inside = [group.feed for name, group in graph.groups.items() if "transformer_blocks" in name]
        assert not any(isinstance(feed, LinearModulation) for feed in inside)
    for family in ("wan", "sana"):
        feeds = [group.feed for group in small_graph(family).groups.values()]
        assert any(isinstance(feed, TableModulation) for feed in feeds)


def test_an_output_that_reads_an_attention_in_two_parts_is_known_once() -> None:
    """HunyuanVideo's single blocks take text and video apart and join them again in front of the output linear."""
    found = small_graph("hunyuan_video").attentions["single_transformer_blocks.0.attn"]
    assert [output.site for output in found.outputs] == ["single_transformer_blocks.0.proj_out"] and found.foldable


def test_an_engine_for_videos_runs_low_bit_at_other_lengths_and_sizes(tmp_path: Path) -> None:
    engine = engine_of(quantize_blocks(shallow_model("wan")), tmp_path / "engine")
    assert not engine.manifest["dropped_axes"] and prove_fusion(engine).complete
    inputs = small_inputs(shallow_model("wan"))
    inputs["hidden_states"] = torch.randn(2, 4, 2, 4, 12, generator=torch.Generator().manual_seed(0))
    assert model_agreement(engine, inputs).holds


def test_a_choice_between_truth_values_becomes_logic() -> None:
    condition, one, other = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([4])) for name in "cab"
    )
    where = ir.node("Where", [condition, one, other])
    where.outputs[0].dtype = ir.DataType.BOOL
    graph = ir.Graph([condition, one, other], where.outputs, nodes=[where], opset_imports={"": 23})
    _choose_by_logic(ir.Model(graph, ir_version=10))
    assert [node.op_type for node in graph] == ["And", "Not", "And", "Or"]
    and_not, no = list(graph)[2], list(graph)[1]
    assert and_not.inputs[0] is no.outputs[0] and and_not.inputs[1] is other
    assert graph.outputs[0].producer() is list(graph)[3]
