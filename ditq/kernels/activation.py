"""Activations of the feed-forward inside kernels: behind a product, or in front of a quantized input."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("", "gelu_tanh", "gelu", "silu")


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation of float32 z; '' is none."""
    if ACTIVATION == "gelu_tanh":  # z / (1 + e^-2t), t = sqrt(2 / pi) (z + 0.044715 z^3), with log2(e) in the factors
        t = z * (-2.302208198144325 - 0.1029432395800235 * z * z)
        z = z / (1.0 + tl.exp2(t))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z


def activation_meaning(z: Tensor, activation: str) -> Tensor:
    """The same in plain torch."""
    if activation == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none") if activation else z
