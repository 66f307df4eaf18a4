"""quantize on another device: nothing it computes with is left on the CPU, and what it makes is the same and comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.passes.base import Context
from ditq.passes.quantize import Quantize
from tests.families_small import small_graph, statistics_of
from tests.pretend_gpu import OnGpu, pretended_gpu

SETTINGS: list[dict[str, Any]] = [
    {"format": "w8a8"},
    {"format": "w4a8", "group_size": 16, "damping": 0.05, "refine": 2},
    {"format": "w4a8", "codebook": "twin_log"},
    {"format": "w3a8", "codebook": "lloyd_max"},
    {"format": "w4a16", "codebook": "nf", "group_size": 16},
    {"format": "w4a8", "codebook": "e2m1"},
    {"format": "w4a8", "codebook": "apot"},
    {"format": "w4a8", "carrier": "float8_e4m3"},
    {"format": "w4a8", "codebook": "auto", "codebooks": ["twin_log_shared", "uniform"]},
    {"format": "w4a4", "rank": 4, "activation_grid": "midrise", "activation_clip": True},
    {"format": "w4a8", "activation": "tensor", "activation_noise": True},
    {"format": "w3a8", "scale_search": 2},
    {"format": "w4a8", "rounding": "nearest"},
    {"format": "w4a8", "centred": True},
    {"format": "nvfp4", "refine": 2},
]


def made(settings: dict[str, Any], device: torch.device | None = None) -> dict[str, QuantLinear]:
    graph: DiTGraph = small_graph("dit")
    context = Context(statistics_of(graph)) if device is None else Context(statistics_of(graph), device=device)
    with torch.no_grad():
        Quantize(select=["*.0.attn1.to_q", "*.0.ff.*"], **settings).run(graph, context)
    return {name: layer for name, layer in graph.model.named_modules() if isinstance(layer, QuantLinear)}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
def test_the_same_layers_are_made_and_come_back(settings: dict[str, Any]) -> None:
    expected = made(settings)
    with pretended_gpu() as device:
        found = made(settings, device)
    assert found.keys() == expected.keys() and len(found) > 2
    for name, layer in found.items():
        for key, tensor in layer.state_dict().items():
            assert isinstance(tensor, Tensor) and not isinstance(tensor, OnGpu), (name, key)
            other = expected[name].state_dict()[key]
            if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                tensor, other = tensor.view(torch.uint8), other.view(torch.uint8)
            assert torch.equal(tensor, other) if not tensor.is_floating_point() else tensor.allclose(other), (name, key)


def test_what_a_gpu_refuses_is_refused() -> None:
    """The test's own tool: a tensor of the CPU beside one of the GPU, and a CPU's generator."""
    with pretended_gpu() as device:
        x = torch.ones(3).to(device)
        assert (x + 1).device == device and (x + torch.ones(3, device=device)).sum().item() == 6
        with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="indices should be either on cpu"):
            torch.ones(3)[x > 0]
        assert x[torch.tensor([True, False, True])].shape == (2,)
        with pytest.raises(RuntimeError, match="expected a 'cuda' generator"):
            torch.randn(3, device=device, generator=torch.Generator())
        assert type(x.cpu()) is Tensor
