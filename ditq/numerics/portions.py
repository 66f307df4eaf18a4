"""Portions of the tokens of one call, so that what stands between two operators stays in a processor's caches.

Gathered windows of a whole picture are many times its keys; read back from memory they cost more than their products. A GPU
fuses these operators instead, and where gradients are wanted all of it is kept anyway: there one portion is all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CACHED = 2**22  # bytes of one portion


def portions(tensor: Tensor, count: int, elements: int) -> list[slice]:
    """`count` things of so many elements of the tensor's type each, cut into portions of about `CACHED` bytes."""
    at_once = max(1, CACHED // max(1, elements * tensor.element_size()))
    if tensor.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        at_once = count
    return [slice(start, start + at_once) for start in range(0, count, max(1, at_once))]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """One behind the other along `dim`; a single one as it is, not as a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
