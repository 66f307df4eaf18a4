"""The layer that re-implemented peers put in place of a linear: dequantized weight, quantized input, full-precision rest.

    x' = transform(x)        y = act(x') W^^T + (x' A) B + b

Quantization is simulated, as in the peers' own published code: values are on the grid, products are in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.numerics.uniform import quantize_per_token

Map = Callable[[Tensor], Tensor]


class PeerLinear(nn.Module):
    """See the module. `low_rank`: (A [I, r], B [r, O]), a branch that reads the input before it is quantized."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        act: Map | None = None,
        transform: Map | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.act, self.transform, self.low_rank = act, transform, low_rank

    def forward(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = self.transform(x)
        y = F.linear(x if self.act is None else self.act(x), self.weight, self.bias)
        if self.low_rank is not None:
            y = y + x @ self.low_rank[0] @ self.low_rank[1]
        return y


def per_token(bits: int, clip: float = 1.0) -> Map | None:
    """Symmetric, one dynamic scale a token, its range `clip` times the largest magnitude. 16 bits: nothing to do."""
    if bits >= 16:
        return None
    limit = 2 ** (bits - 1) - 1

    def quantize(x: Tensor) -> Tensor:
        if clip == 1.0:
            q, scale = quantize_per_token(x, bits)
            return q * scale
        scale = (x.abs().amax(-1, keepdim=True) * clip / limit).clamp_min(1e-8)
        return (x / scale).round().clamp(-limit - 1, limit) * scale

    return quantize


def per_group(bits: int, size: int) -> Map | None:
    """Symmetric, one dynamic scale for each `size` channels of a token."""
    token = per_token(bits)
    if token is None:
        return None
    return lambda x: token(x.unflatten(-1, (-1, size))).flatten(-2)


def asymmetric(bits: int, size: int | None = None, clip: float = 1.0) -> Map | None:
    """Asymmetric with a zero point, one dynamic range a token, or one for each `size` channels of it."""
    if bits >= 16:
        return None
    levels = (1 << bits) - 1

    def quantize(x: Tensor) -> Tensor:
        grouped = x if size is None else x.unflatten(-1, (-1, size))
        low = grouped.amin(-1, keepdim=True).clamp_max(0) * clip
        high = grouped.amax(-1, keepdim=True).clamp_min(0) * clip
        scale = ((high - low) / levels).clamp_min(1e-8)
        zero = (-low / scale).round()
        y = (((grouped / scale).round() + zero).clamp(0, levels) - zero) * scale
        return y if size is None else y.flatten(-2)

    return quantize


def static(bits: int, low: Tensor, high: Tensor) -> Map:
    """Asymmetric with one calibrated range for the whole tensor."""
    levels = (1 << bits) - 1
    scale = ((high - low) / levels).clamp_min(1e-8)
    zero = (-low / scale).round()
    return lambda x: (((x / scale).round() + zero).clamp(0, levels) - zero) * scale


def chain(*maps: Map | None) -> Map:
    """One after the other; None is left out."""
    wanted = [step for step in maps if step is not None]

    def run(x: Tensor) -> Tensor:
        for step in wanted:
            x = step(x)
        return x

    return run


def scaled(factor: Tensor) -> Map:
    """x * factor, channel by channel."""
    return lambda x: x * factor


def stacked_weight(linears: list[nn.Linear]) -> Tensor:
    """The weights of all linears of an input, one below the other: float32 [sum O, I]."""
    return torch.cat([linear.weight.detach().float() for linear in linears])


def smoothing(largest_input: Tensor, largest_weight: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the divisor of the input (SmoothQuant, Xiao 2023, eq. 4)."""
    scale = largest_input.float().clamp_min(1e-5) ** alpha / largest_weight.float().clamp_min(1e-5) ** (1 - alpha)
    return scale.clamp_min(1e-5)
