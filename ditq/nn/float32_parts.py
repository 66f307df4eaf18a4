"""The parts of a model that compute in float32 whatever the rest does: what its class in diffusers names so.

Wan's positions, time embedding and tables of modulation are such: rounded to bfloat16 they move every block's answer.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def stays_in_float32(model: nn.Module, name: str) -> bool:
    """Whether that tensor of `model` does. A model's class says it in `_keep_in_fp32_modules`, by parts of names."""
    kept: list[str] = getattr(model, "_keep_in_fp32_modules", None) or []
    return any(part in kept for part in name.split("."))


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move `model` there in `dtype`, all but those parts, in place."""
    named = chain(model.named_parameters(), model.named_buffers())
    exact: dict[str, Tensor] = {
        name: tensor.data for name, tensor in named if tensor.is_floating_point() and stays_in_float32(model, name)
    }
    nn.Module.to(model, device, dtype)  # that of diffusers' models warns of such parts whether there are any or not
    for name, value in exact.items():
        owner, _, own = name.rpartition(".")
        getattr(model.get_submodule(owner), own).data = value.to(device, torch.float32)
    return model
