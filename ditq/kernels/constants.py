"""Parts of a denoiser that compute on the CPU although the model is on a GPU: what they give is a constant, and kept there.

Chroma's is one, the embedding of a guidance of 0 that it makes anew in each call. A call that is recorded (captured.py) may not
copy from the CPU's memory, and no input of it lies there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditq.kernels.blocks import blocks_of

Kept = dict[tuple[Any, ...], Tensor]


def keep_constants(model: nn.Module, device: torch.device) -> None:
    """Let parts without weights outside of the blocks give what they compute elsewhere as tensors on `device`."""
    inside = {part for block in blocks_of(model).values() for part in block.modules()}
    for part in model.modules():
        bare = next(part.children(), None) is None and not part.state_dict()
        if bare and part not in inside:
            part.register_forward_hook(partial(_on_device, {}, device))


def _on_device(kept: Kept, device: torch.device, _: nn.Module, __: Any, output: Any) -> Tensor | None:
    if not isinstance(output, Tensor) or output.device.type != "cpu" or device.type == "cpu":
        return None
    key = (tuple(output.shape), output.dtype, output.float().numpy().tobytes())
    if key not in kept:
        kept[key] = output.to(device)
    return kept[key]
