"""Activations of the feed-forward inside kernels: behind a product, or in front of a quantized input."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("", "gelu_tanh", "gelu", "silu")


@triton.jit
def _tanh(t):
    """By the GPU's own instruction, to 2^-11 relative: less than bfloat16 keeps, in a quarter of the time."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation of float32 z; '' is none."""
    if ACTIVATION == "gelu_tanh":
        half = 0.5 * z
        z = half + half * _tanh(z * (0.7978845608028654 + 0.035677408136300125 * (z * z)))
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
