"""The bytes of a tensor, for digests and comparisons in which every bit counts."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> Tensor:
    """uint8 [n], in the order of the tensor's elements, on its device.

    One number that was expanded keeps a stride of 0 whatever torch calls contiguous, and is then no bytes to torch.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)
