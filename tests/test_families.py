"""Families beyond the four that every pass is tested on: what is folded is exact, and their graphs run low-bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import onnx_ir as ir
import pytest
import torch

from ditq.export import load_engine, model_agreement
from ditq.export.fusion import prove_fusion
from ditq.export.onnx_graph import _choose_by_logic
from ditq.graph import DiTGraph
from ditq.parts import LinearModulation, NormModulation, TableModulation
from ditq.pass_pipeline import run_passes
from ditq.recipe import Recipe
from tests.export.quantized import engine_of, means_torch, quantize_blocks, relative, shallow_model
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


STRANGERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[type, int]]] = {
    # a piece of a modulation is cut into pieces once more; one such in front of each attention and feed-forward
    "qwen": (
        diffusers.QwenImageTransformer2DModel,
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 32,
         "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12)},
        {"hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": torch.randn(2, 6, 24),
         "timestep": torch.tensor([0.2, 0.9]), "img_shapes": [[(1, 4, 4)]] * 2},
        {LinearModulation: 9, NormModulation: 1},
    ),
    # its norms are written out
    "ltx": (
        diffusers.LTXVideoTransformer3DModel,
        {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64,
         "num_layers": 2, "caption_channels": 24},
        {"hidden_states": torch.randn(2, 32, 8), "encoder_hidden_states": torch.randn(2, 6, 24), "num_frames": 2,
         "timestep": torch.tensor([200.0, 900.0]), "encoder_attention_mask": torch.ones(2, 6, dtype=torch.int64),
         "height": 4, "width": 4, "rope_interpolation_scale": (0.3, 32, 32)},
        {TableModulation: 4},
    ),
    # its feed-forwards see the picture and then the text, modulated in different ways
    "cogview4": (
        diffusers.CogView4Transformer2DModel,
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 32,
         "num_attention_heads": 2, "text_embed_dim": 24, "time_embed_dim": 32, "condition_dim": 16, "sample_size": 8,
         "pos_embed_max_size": 16, "rope_axes_dim": (16, 16)},
        {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 16, 24),
         "timestep": torch.tensor([200.0, 900.0]), "original_size": torch.full((2, 2), 64.0),
         "target_size": torch.full((2, 2), 64.0), "crop_coords": torch.zeros(2, 2)},
        {LinearModulation: 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_models_of_no_family_are_understood_by_their_structure(name: str) -> None:
    builder, config, inputs, feeds = STRANGERS[name]
    torch.manual_seed(0)
    model = builder(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
    graph = DiTGraph(model, inputs)
    assert Counter(type(group.feed) for group in graph.groups.values() if group.feed) == feeds
    expected = forward(model, inputs)
    run_passes(graph, Recipe.from_dict(FOLDS, "test"), statistics_of(graph, inputs=[inputs]))
    assert float((forward(model, inputs) - expected).norm() / expected.norm()) < 1e-5


def test_an_output_that_reads_an_attention_in_two_parts_is_known_once() -> None:
    """HunyuanVideo's single blocks take text and video apart and join them again in front of the output linear."""
    found = small_graph("hunyuan_video").attentions["single_transformer_blocks.0.attn"]
    assert [output.site for output in found.outputs] == ["single_transformer_blocks.0.proj_out"] and found.foldable


def test_an_engine_for_videos_runs_low_bit_at_other_lengths_and_sizes(tmp_path: Path) -> None:
    engine = engine_of(quantize_blocks(shallow_model("wan")), tmp_path / "engine")
    assert prove_fusion(engine).complete
    inputs = small_inputs(shallow_model("wan"))
    inputs["hidden_states"] = torch.randn(2, 4, 2, 4, 12, generator=torch.Generator().manual_seed(0))
    assert model_agreement(engine, inputs).holds
    means_torch(engine, inputs)


def test_an_engine_of_chroma_takes_any_number_of_samples(tmp_path: Path) -> None:
    """Its time embedding makes a list of as many zeros as there are samples, which tracing would take for a constant."""
    model = shallow_model("chroma", num_single_layers=0)
    transformer = load_engine(engine_of(model, tmp_path / "engine").folder, threads=1)
    for batch in (1, 3):
        inputs = small_inputs(model, batch)
        assert relative(transformer(**inputs).sample, forward(model, inputs)) < 1e-5
    means_torch(transformer.engine, inputs)
    assert "forward" not in model.get_submodule("time_text_embed").__dict__  # the class's own again


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
