"""Where a model runs while it draws and is read, and weights are rounded: a GPU, with the model in bfloat16, or the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq.errors import DitqError
from ditq.memory import free_memory

AUTO = "auto"
FILLED = 0.75  # share of a GPU's free memory that weights may take; the rest is for what a call makes, and for sums
STAY = ("transformer", "vae")  # a VAE has methods that are called past the hooks which bring a module


def device_of(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        DitqError: another name, or a GPU that is not here.
    """
    if not isinstance(name, str):
        raise DitqError(f"device is {name!r}; give cpu, cuda or cuda:N")
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DitqError(f"device is {name!r}; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DitqError(f"device is {name!r}; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DitqError(
            f"device {name}: torch sees {torch.cuda.device_count()} GPUs; give --device cpu, or see `ditq doctor`"
        )
    return device


def dtype_on(device: torch.device) -> torch.dtype:
    """What a model computes in there, unless it is said otherwise."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def place_pipeline(pipeline: Any, device: torch.device, free: int | None = None) -> bool:
    """Bring a diffusers pipeline to a device; there, what would not fit stands in the CPU's memory and comes when it runs.

    Where all parts together would take more than three quarters of the free memory, those that read the prompt come layer by
    layer; where the rest would too, the transformer comes block by block, the next while one runs (group offloading of
    diffusers). The pipeline draws the same either way.

    Args:
        free: bytes that are free there; None: as many as there are, on the CPU all that is asked for.

    Returns:
        Whether the transformer comes block by block, and so cannot be moved elsewhere any more.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if free is None and device.type == "cpu":
        pipeline.to(device)
        return False
    limit = FILLED * (free_memory(device) if free is None else free)
    sizes = {name: bytes_of(part) for name, part in parts.items()}
    by_layers = [] if sum(sizes.values()) <= limit else [name for name in parts if name not in STAY]
    by_blocks = sum(size for name, size in sizes.items() if name not in by_layers) > limit
    for name, part in parts.items():
        if name == "transformer" and by_blocks:
            _bring_when_called(part, device, "block_level")
        elif name in by_layers:
            _bring_when_called(part, device, "leaf_level")
        else:
            part.to(device)
    return by_blocks


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _bring_when_called(module: nn.Module, device: torch.device, how: str) -> None:
    from diffusers.hooks import apply_group_offloading

    ahead = device.type == "cuda" and how == "block_level"
    apply_group_offloading(module, device, offload_type=how, num_blocks_per_group=1, use_stream=ahead)
