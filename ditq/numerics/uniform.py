"""Symmetric uniform quantization of activations: integers q and a scale s with x ~ q s.

The integers stay in a floating dtype, where every one of them is exact, so that the same function serves as the plain
meaning of an integer kernel. Rounding is half to even, like the runtimes'.
"""

from __future__ import annotations

import torch

SMALLEST_SCALE = 1e-8  # an all-zero token still has a positive scale


def largest_integer(bits: int) -> int:
    """q_max = 2^(bits-1) - 1; the range is [-q_max, q_max].

    Raises:
        ValueError: for bits outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"activations have 2 to 8 bits, not {bits}")
    return (1 << (bits - 1)) - 1


def wide(x: torch.Tensor) -> torch.Tensor:
    """x for computing: half precision is computed in float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def absmax_scale(absmax: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale s = max|x| / q_max that just covers magnitudes up to `absmax` (any shape), at least 1e-8."""
    return (wide(absmax) / largest_integer(bits)).clamp_min(SMALLEST_SCALE)


def steps_per_tensor(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """clamp(x / s, -q_max, q_max), what is then rounded, for a given scale (any shape that broadcasts to x)."""
    q_max = largest_integer(bits)
    return (wide(x) / scale).clamp(-q_max, q_max)


def steps_per_token(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps_per_tensor` and scale [..., 1]: each token's own max|x| / q_max, found as it comes (dynamic)."""
    scale = absmax_scale(x.abs().amax(dim=-1, keepdim=True), bits)
    return steps_per_tensor(x, scale, bits), scale


def quantize_per_tensor(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers q = round(clamp(x / s, -q_max, q_max)); the same as clamping what was rounded."""
    return steps_per_tensor(x, scale, bits).round()


def quantize_per_token(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers q (x's shape) and scale [..., 1]."""
    steps, scale = steps_per_token(x, bits)
    return steps.round(), scale
