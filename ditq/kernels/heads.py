"""Queries and keys as an attention reads them, in one pass: norm of each head, rotary embedding; rotation, rounding to FP8.

    z  = x w / sqrt(mean(x^2) + epsilon)         of each head's channels; or x
    y  = z cos + (-z_1, z_0, -z_3, z_2, ..) sin  cos, sin [T, d] of each token; or z
    y' = clip(y R f, 448) in e4m3                f one over the scale of FP8 attention, R its rotation; or y in x's dtype

The tokens of several tensors, such as text and image, are put one behind the other. torch's compiler makes several passes of
this, and one of its pairs of channels reads each number several times. What is rotated is rounded to bfloat16 once, in which
signs are exact. `heads_meaning` is the same in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ditq.numerics.attention_rounding import FLOAT8, LARGEST, rotation_of_heads
from ditq.numerics.carrier import E4M3

_LARGEST = tl.constexpr(LARGEST[FLOAT8])
TOKENS, HEADS, WARPS = 64, 4, 8  # of a program; fewer tokens would be multiplied without the tensor cores' larger tiles
_LEAST = 16  # channels of a padded head that tensor cores multiply


@triton.jit
def _pairs(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] -> its channels of even and of odd number, float32 [ROWS, WIDTH / 2]."""
    return tl.split(tl.reshape(tile.to(tl.float32), (ROWS, WIDTH // 2, 2)))


@triton.jit
def heads_kernel(
    x, weight, cos, sin, factor, matrix, y, tokens, first, all_tokens, heads, x_sample, x_token, x_head, epsilon, size,
    d: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, ROTARY: tl.constexpr,
    ROTATED: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and HEADS heads of one sample. first: place of x's first token among all of y's. WIDTH: d, padded. R is
    `matrix` [d, d] of signs, times `size`."""
    token, sample = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens)[:, None] & (channel < d)
    place = first + token
    of_x = sample * x_sample + token.to(tl.int64)[:, None] * x_token + channel
    of_y = (sample * all_tokens + place)[:, None] * (heads * d) + channel
    w_even, w_odd = 1.0, 1.0
    if WEIGHT:
        w_even, w_odd = _pairs(tl.load(weight + channel, mask=channel < d, other=0.0), 1, WIDTH)
    if ROTARY:  # the same for all heads, with the norm's weight in it
        at = place[:, None] * d + channel
        cos_even, cos_odd = _pairs(tl.load(cos + at, mask=inside, other=0.0), TOKENS, WIDTH)
        sin_even, sin_odd = _pairs(tl.load(sin + at, mask=inside, other=0.0), TOKENS, WIDTH)
        cos_even, cos_odd, sin_even, sin_odd = cos_even * w_even, cos_odd * w_odd, sin_even * w_odd, sin_odd * w_even
    if ROTATED:
        row = tl.arange(0, WIDTH)[:, None]
        signs = tl.load(matrix + row * d + channel, mask=(row < d) & (channel < d), other=0.0)
    times = size
    if ROUND:
        times *= tl.load(factor)
    for i in range(HEADS):
        head = tl.program_id(1) * HEADS + i
        here = (token < tokens)[:, None] & (channel < tl.where(head < heads, d, 0))
        even, odd = _pairs(tl.load(x + of_x + head * x_head, mask=here, other=0.0), TOKENS, WIDTH)
        if NORM:
            spread = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / d + epsilon)[:, None]
            even, odd = even * spread, odd * spread
        if ROTARY:
            even, odd = even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd
        elif WEIGHT:
            even, odd = even * w_even, odd * w_odd
        z = tl.reshape(tl.join(even, odd), (TOKENS, WIDTH))
        if ROTATED:
            z = tl.dot(z.to(tl.bfloat16), signs)
        if ROTATED or ROUND:
            z *= times
        if ROUND:
            z = tl.clamp(z, -_LARGEST, _LARGEST)
        tl.store(y + of_y + head * d, z.to(y.dtype.element_ty), mask=here)


def launch(
    pieces: Sequence[Tensor],
    weights: Sequence[Tensor],
    epsilon: float,
    cos: Tensor | None,
    sin: Tensor | None,
    factor: Tensor | None,
    rotation: tuple[Tensor, float] | None,
    y: Tensor,
) -> None:
    """Fill y [B, T, h, d] from pieces [B, T_i, h, d], of which channels lie side by side.

    weights: of the norm [d], one a piece, or none. epsilon: of the norm, negative for none. rotation: see `signs_of_heads`.
    """
    first = 0
    for number, x in enumerate(pieces):
        weight = weights[number] if weights else None
        values, constants = arguments(x, weight, epsilon, cos, sin, factor, rotation, y, first)
        samples, tokens, heads = x.shape[:3]
        heads_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(heads, HEADS), samples)](*values, **constants)
        first += tokens


def arguments(
    x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor | None, sin: Tensor | None, factor: Tensor | None,
    rotation: tuple[Tensor, float] | None, y: Tensor, first: int,
) -> tuple[list[Tensor | int | float], dict[str, object]]:  # fmt: skip
    """(what the kernel takes, what it is compiled for) for one piece, whose first token has that place in y."""
    _, tokens, heads, width = x.shape
    matrix, size = (None, 1.0) if rotation is None else rotation
    given = [x if tensor is None else tensor for tensor in (weight, cos, sin, factor, matrix)]
    values: list[Tensor | int | float] = [
        x,
        *given,
        y,
        tokens,
        first,
        y.shape[1],
        heads,
        *x.stride()[:3],
        epsilon,
        size,
    ]
    constants = {
        "d": width, "WIDTH": max(triton.next_power_of_2(width), _LEAST), "NORM": epsilon >= 0, "WEIGHT": weight is not None,
        "ROTARY": cos is not None, "ROTATED": matrix is not None, "ROUND": factor is not None, "TOKENS": TOKENS,
        "HEADS": HEADS, "num_warps": WARPS,
    }  # fmt: skip
    return values, constants


def heads_meaning(
    pieces: Sequence[Tensor],
    weights: Sequence[Tensor],
    epsilon: float,
    cos: Tensor | None,
    sin: Tensor | None,
    factor: Tensor | None,
    rotation: tuple[Tensor, float] | None = None,
) -> Tensor:
    """y [B, T, h, d] in float64, before it is rounded to what it is stored in."""
    normed = []
    for number, x in enumerate(pieces):
        z = x.double()
        if epsilon >= 0:
            z = z * (z.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        normed.append(z * weights[number].double() if weights else z)
    z = torch.cat(normed, 1)
    if cos is not None and sin is not None:
        even, odd = z.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), -1).flatten(-2)
        z = z * cos.double()[:, None] + turned * sin.double()[:, None]
    if rotation is not None:
        z = z.float().to(torch.bfloat16).double() @ rotation[0].double() * rotation[1]
    return z if factor is None else (z * factor.double()).clamp(-LARGEST[FLOAT8], LARGEST[FLOAT8])


@custom_op("ditq::heads", mutates_args=())
def heads(
    pieces: Sequence[Tensor],
    weights: Sequence[Tensor],
    epsilon: float,
    cos: Tensor | None,
    sin: Tensor | None,
    factors: Tensor | None,
    which: int,
    rotate: bool,
) -> Tensor:
    """[B, T, h, d] of pieces [B, T_i, h, d], in e4m3 with `factors` [..], of which `which` is taken, else in their dtype.

    rotate: by `rotation_of_heads`. cos and sin have T d numbers, in any shape. On a CPU the meaning is computed.
    """
    made = _made(pieces, factors)
    tokens, width = made.shape[1], made.shape[3]
    cos, sin = (None if table is None else table.reshape(tokens, width).contiguous() for table in (cos, sin))
    factor = None if factors is None else factors[which : which + 1]
    rotation = signs_of_heads(width, made.device) if rotate else None
    if made.is_cuda:
        rows = [piece if piece.stride(-1) == 1 else piece.contiguous() for piece in pieces]
        launch(rows, [weight.contiguous() for weight in weights], epsilon, cos, sin, factor, rotation, made)
        return made
    return heads_meaning(pieces, weights, epsilon, cos, sin, factor, rotation).float().to(made.dtype)


@cache
def signs_of_heads(width: int, device: torch.device) -> tuple[Tensor, float]:
    """(signs [d, d] in bfloat16, 0 between its blocks, their common size) of numerics' `rotation_of_heads`."""
    matrix = rotation_of_heads(width)
    return matrix.sign().to(device, torch.bfloat16), float(matrix.abs().max())


def _made(pieces: Sequence[Tensor], factors: Tensor | None) -> Tensor:
    samples, _, count, width = pieces[0].shape
    dtype = pieces[0].dtype if factors is None else E4M3
    return pieces[0].new_empty((samples, sum(piece.shape[1] for piece in pieces), count, width), dtype=dtype)


@heads.register_fake
def _(pieces, weights, epsilon, cos, sin, factors, which, rotate):  # type: ignore[no-untyped-def]
    return _made(pieces, factors)
