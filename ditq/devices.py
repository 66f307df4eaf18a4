"""Where a model runs while it draws and is read, and weights are rounded: a GPU, with the model in bfloat16, or the CPU."""

from __future__ import annotations

import torch

from ditq.errors import DitqError

AUTO = "auto"


def device_of(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        DitqError: another name, or a GPU that is not here.
    """
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
