"""Small transformers of each family with random weights, modulation included, and statistics of their inputs."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import diffusers
import torch
from torch import nn

from ditq.calibration.accumulate import InputAccumulator
from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.statistics import Statistics
from ditq.families import family_of
from ditq.graph import DiTGraph

FAMILIES = ("flux", "sd3", "pixart", "dit")
OTHERS = ("wan", "chroma", "flux2", "sana", "hunyuan_video")

_BUILDERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (
        diffusers.FluxTransformer2DModel,
        {"in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
         "joint_attention_dim": 24, "pooled_projection_dim": 24, "axes_dims_rope": (8, 12, 12)},
    ),
    "sd3": (
        diffusers.SD3Transformer2DModel,
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 32,
         "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 64, "pooled_projection_dim": 24,
         "out_channels": 4, "pos_embed_max_size": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    ),
    "pixart": (
        diffusers.PixArtTransformer2DModel,
        {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "cross_attention_dim": 64, "sample_size": 8, "patch_size": 2, "caption_channels": 24,
         "use_additional_conditions": False},
    ),
    "dit": (
        diffusers.DiTTransformer2DModel,
        {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
    ),
    "wan": (
        diffusers.WanTransformer3DModel,
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
         "text_dim": 24, "freq_dim": 64, "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 64},
    ),
    "chroma": (
        diffusers.ChromaTransformer2DModel,
        {"in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
         "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12), "approximator_num_channels": 16,
         "approximator_hidden_dim": 32, "approximator_layers": 1},
    ),
    "flux2": (
        diffusers.Flux2Transformer2DModel,
        {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
         "joint_attention_dim": 24, "axes_dims_rope": (8, 8, 8, 8), "timestep_guidance_channels": 64},
    ),
    "sana": (
        diffusers.SanaTransformer2DModel,
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 24,
         "sample_size": 8},
    ),
    "hunyuan_video": (
        diffusers.HunyuanVideoTransformer3DModel,
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1,
         "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 24,
         "pooled_projection_dim": 24, "rope_axes_dim": (8, 12, 12)},
    ),
}  # fmt: skip


def small_model(family: str, seed: int = 0) -> nn.Module:
    """A two-block model with weights large enough that every part matters (an untrained adaLN-Zero block is the identity)."""
    torch.manual_seed(seed)
    builder, config = _BUILDERS[family]
    model = builder(**config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
    return model.eval().requires_grad_(False)


def small_inputs(model: nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    family, config = family_of(type(model).__name__), cast(Any, model.config)
    assert family is not None
    return family.example_inputs(config, batch, seed)


def small_graph(family: str) -> DiTGraph:
    """A graph of its own each time; the tracing, which takes longest, is done once."""
    return copy.deepcopy(_traced(family))


@functools.cache
def _traced(family: str) -> DiTGraph:
    model = small_model(family)
    return DiTGraph(model, small_inputs(model))


def statistics_of(graph: DiTGraph, forwards: int = 3, inputs: list[dict[str, Any]] | None = None) -> Statistics:
    """Statistics of the graph's inputs over a few forwards of random inputs, or of those given."""
    used = [group for group in graph.groups.values() if graph.sites[group.name].role != "unused"]
    gathered = {group.name: InputAccumulator(group.name, group.width, 1, 64, 0) for group in used}
    handles = [
        graph.linear(name).register_forward_pre_hook(
            lambda _, inputs, found=found: found.add(inputs[0].reshape(-1, inputs[0].shape[-1]).float(), 0) and None
        )
        for name, found in gathered.items()
    ]
    for given in inputs or [small_inputs(graph.model, seed=seed) for seed in range(forwards)]:
        forward(graph.model, given)
    for handle in handles:
        handle.remove()
    groups = {name: InputStatistics(**found.tensors()) for name, found in gathered.items()}
    metadata = {"checkpoint": {"fingerprint": "", "name": "small"}, "bins": 1}
    return Statistics(groups, {group.name: group.sites for group in used}, metadata)


@torch.no_grad()
def forward(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]
