"""Attention with what it multiplies rounded to 8 bits: queries Q, keys K, values V and probabilities P; its output O as well.

    S = Q K^T / sqrt(d) + mask      P = exp(S - max_j S)      l = sum_j P      O = P V / l

    int8          n = round(x / s)                                           |n| <= 127, of P 0 <= n <= 255
    float8_e4m3   n = x / s at the nearest number with 3 bits of mantissa    |n| <= 448

The scales s lie where they can leave a product of the n: along its outputs, never along what it sums over. So a query and a
key have one each (per token and head), values one a channel and head: s = max|x| / largest n. P needs none of its own. It
is taken before the division by l, where the largest of each query is exactly 1, so that s = 1/255 fits all; after it, the
probabilities of 1,024 tokens are near 1/1,024 and would all be rounded to 0. It is never negative, so that int8's half for
negative numbers would be lost on it: hence the 256 codes of uint8. O is a mean of values and never larger than they are, so
that it has their scale.

Those are dynamic scales, of each call. Static ones are three numbers, for all queries, keys and values of an attention, found
beforehand; what is beyond them is clipped. They are for float8, whose exponents make up for a scale that is too large, and
what NVIDIA's kernels of FP8 attention take (cuDNN's, TensorRT's).

Keys share a large offset, which would cost them their resolution. K - mean_j K (the mean over tokens) changes S by the same
number for all keys of a query, which the softmax cancels: smoothing keys is exact.

A few channels of queries and keys are often far larger than the others and decide on most scores, with their own rounding
error. Q R and K R, with one orthogonal R for both, have the same scores, (Q R)(K R)^T = Q K^T; a Hadamard matrix spreads what
they hold over all channels, so that their errors average out.

Source: FlashAttention-3 (Shah 2024, arXiv 2407.08608), 3.3, for the rotation, which it calls incoherent processing.
SageAttention (Zhang 2024, arXiv 2410.02367), 4.2 for smoothing keys and 4.3 for P; float8 as in SageAttention2
(Zhang 2024, arXiv 2411.10958). They share scales by blocks of tokens, and P has int8 there, because one GPU kernel goes
over blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.rotation import block_hadamard_rotation
from ditq.numerics.uniform import SMALLEST_SCALE, wide

INTEGER, FLOAT8 = "int8", "float8_e4m3"
FORMATS = (INTEGER, FLOAT8)
PARTS, MULTIPLIED = "qkvpo", "qkvp"
LARGEST = {INTEGER: 127.0, FLOAT8: 448.0}  # n of queries, keys, values
LARGEST_OF_P = {INTEGER: 255.0, FLOAT8: 448.0}
STEP_OF_P = {number: float(torch.tensor(1 / largest)) for number, largest in LARGEST_OF_P.items()}  # as float32 has it
OVER = {"q": -1, "k": -1, "v": -2}  # the dimension that shares a scale: channels, channels, tokens
_MANTISSA, _SMALLEST_EXPONENT = 3, -6  # of float8_e4m3

PartRounding = Callable[[str, Tensor], Tensor]
"""(part, its values in steps) -> n."""


@dataclass(frozen=True)
class AttentionFormat:
    """What of an attention is rounded, and to what.

    number: `int8` or `float8_e4m3`. parts: letters of `qkvpo`. smooth_keys: take the mean over tokens out of the keys before
    they are rounded; nothing where they are not. scales: static ones of q, k and v; none where they are dynamic. rotate: both
    queries and keys, before either is rounded.

    Raises:
        ValueError: another number format; parts that are not letters of qkvpo, each once, or o without v; static scales that
            are not three positive numbers, or of int8.
    """

    number: str = INTEGER
    parts: str = MULTIPLIED
    smooth_keys: bool = True
    scales: tuple[float, ...] = ()
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.number not in FORMATS:
            raise ValueError(f"attention is rounded to {' or '.join(FORMATS)}, not {self.number}")
        if not self.parts or set(self.parts) - set(PARTS) or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts of an attention are letters of {PARTS}, each once, not {self.parts!r}")
        if "o" in self.parts and "v" not in self.parts:
            raise ValueError("the output o of an attention is rounded by the scale of its values; round v as well")
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON has lists
        if self.scales and (len(self.scales) != 3 or min(self.scales) <= 0 or self.number != FLOAT8):
            raise ValueError(
                f"static scales are three positive numbers for {FLOAT8}, not {self.scales} for {self.number}"
            )

    @property
    def turns(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.rotate and bool({"q", "k"} & set(self.parts))

    def static(self, part: str) -> float | None:
        """The scale of queries, keys or values where it is static."""
        return self.scales["qkv".index(part)] if self.scales else None

    def multiplies_integers(self, parts: str) -> bool:
        """Whether the product of these two parts is one of integers: `qk` or `pv`."""
        return self.number == INTEGER and set(parts) <= set(self.parts)


@cache
def rotation_of_heads(width: int) -> Tensor:
    """R [d, d] in float32 for heads of that many channels: random Hadamard blocks of the largest power of two in d, up to 128.

    The identity for an odd number of channels, which has none.
    """
    if width % 2:
        return torch.eye(width)
    return block_hadamard_rotation(width).apply(torch.eye(width, dtype=torch.float64)).float()


def turned(x: Tensor) -> Tensor:
    """Queries or keys [.., tokens, channels] times R."""
    return x @ rotation_of_heads(x.shape[-1]).to(x)


def nearest(steps: Tensor, number: str) -> Tensor:
    """x / s (any shape) -> n, in the same dtype. Ties go to the even one. Gradients pass straight through."""
    found = steps.detach()
    found = found.round() if number == INTEGER else found.to(torch.float8_e4m3fn).to(steps.dtype)
    if torch.is_grad_enabled() and steps.requires_grad:
        return steps + (found - steps.detach())
    return found


def spacing(steps: Tensor, number: str) -> Tensor:
    """How far apart the numbers around x / s lie (any shape): 1, or 2^(e - 3) for float8 of exponent e >= -6."""
    if number == INTEGER:
        return torch.ones_like(steps)
    exponent = (torch.frexp(steps).exponent - 1).clamp_min(_SMALLEST_EXPONENT)
    return torch.ldexp(torch.ones_like(steps), exponent - _MANTISSA)


def scale_of(x: Tensor, part: str, number: str) -> Tensor:
    """s of queries, keys [.., tokens, 1] or values [.., 1, channels], for x [.., tokens, channels]; at least 1e-8."""
    return (x.abs().amax(OVER[part], keepdim=True) / LARGEST[number]).clamp_min(SMALLEST_SCALE)


def smoothed(keys: Tensor) -> Tensor:
    """K [.., tokens, channels] without its mean over the tokens."""
    return keys - keys.mean(-2, keepdim=True)


def rounded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    form: AttentionFormat,
    rounding: PartRounding | None = None,
) -> Tensor:
    """softmax(Q K^T scale + mask) V with the parts of `form` rounded; computed in float32 or more.

    Args:
        query: [batch, heads, queries, channels]; key, value: [batch, heads, tokens, channels].
        mask: true where a key is seen, or numbers to add; anything that broadcasts to [batch, heads, queries, tokens].
        rounding: what takes steps to n; None is the nearest.

    Returns:
        [batch, heads, queries, channels of the values], in the dtype of `query`.
    """
    take: PartRounding = rounding or (lambda _, steps: nearest(steps, form.number))
    parts = {"q": wide(query), "k": wide(key), "v": wide(value)}
    if form.turns:
        parts["q"], parts["k"] = turned(parts["q"]), turned(parts["k"])
    if form.smooth_keys and "k" in form.parts:
        parts["k"] = smoothed(parts["k"])
    steps = {part: _step(x, part, form) for part, x in parts.items() if part in form.parts}
    largest = LARGEST[form.number]
    n = {
        part: take(part, (x / steps[part]).clamp(-largest, largest)) if part in steps else x
        for part, x in parts.items()
    }

    def as_output(y: Tensor) -> Tensor:
        if "o" in form.parts:
            y = take("o", (y / steps["v"]).clamp(-largest, largest)) * steps["v"]
        return y.to(query.dtype)

    if "p" not in form.parts:
        q, k, v = (n[part] * steps[part] if part in steps else n[part] for part in "qkv")
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return as_output(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale))
    scores = n["q"] @ n["k"].transpose(-1, -2)  # of integers: exact in float32, as an integer kernel has it
    if "k" in steps:
        scores = scores * steps["k"].transpose(-1, -2)
    scores = scores * (steps["q"] * scale if "q" in steps else scale)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(mask, scores, lowest) if mask.dtype == torch.bool else scores + mask
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    step = STEP_OF_P[form.number]
    y = take("p", p / step) @ n["v"] * step
    y = y * steps["v"] if "v" in steps else y
    return as_output(y / p.sum(-1, keepdim=True))


def _step(x: Tensor, part: str, form: AttentionFormat) -> Tensor:
    static = form.static(part)
    return scale_of(x, part, form.number) if static is None else x.new_full((1, 1), static)
