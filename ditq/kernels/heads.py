"""Queries, keys and values as an attention reads them, in one pass: norm of each head, rotary embedding; rotation, rounding to
FP8.

    z  = x w / sqrt(mean(x^2) + epsilon)         of each head's channels; or x
    y  = z cos + (-z_1, z_0, -z_3, z_2, ..) sin  cos, sin [T, d] of each token; or z
    y' = clip(y R f, 448) in e4m3                f one over the scale of FP8 attention, R its rotation; or y in x's dtype

The tokens of several tensors, such as text and image, are put one behind the other. torch's compiler makes several passes of
this, and one of its pairs of channels reads each number several times. What is rotated is rounded to bfloat16 once, in which
signs are exact. Parts that lie alike, as queries, keys and values of one product do, are made by one launch. `heads_meaning` is
the same in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ditq.numerics.attention_rounding import FLOAT8, LARGEST, rotation_of_heads
from ditq.numerics.carrier import E4M3

_LARGEST = tl.constexpr(LARGEST[FLOAT8])
_LEAST = 16  # channels of a padded head that tensor cores multiply
PARTS = 3  # of a launch at most
NORM, WEIGHT, ROTARY, ROTATED = 1, 2, 4, 8  # what is done to a part, a sum of these
_NORM, _WEIGHT, _ROTARY, _ROTATED = (tl.constexpr(step) for step in (NORM, WEIGHT, ROTARY, ROTATED))


@triton.jit
def _pairs(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] -> its channels of even and of odd number, float32 [ROWS, WIDTH / 2]."""
    return tl.split(tl.reshape(tile.to(tl.float32), (ROWS, WIDTH // 2, 2)))


@triton.jit
def _made(
    x, weight, cos, sin, factor, matrix, size, y, group, tokens, first, all_tokens, heads, x_sample, x_token, x_head, epsilon,
    STEPS: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and HEADS heads of one sample."""
    token, sample = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens)[:, None] & (channel < d)
    place = first + token
    of_x = sample * x_sample + token.to(tl.int64)[:, None] * x_token + channel
    of_y = (sample * all_tokens + place)[:, None] * (heads * d) + channel
    w_even, w_odd = 1.0, 1.0
    if _WEIGHT & STEPS:
        w_even, w_odd = _pairs(tl.load(weight + channel, mask=channel < d, other=0.0), 1, WIDTH)
    if _ROTARY & STEPS:  # the same for all heads, with the norm's weight in it
        at = place[:, None] * d + channel
        cos_even, cos_odd = _pairs(tl.load(cos + at, mask=inside, other=0.0), TOKENS, WIDTH)
        sin_even, sin_odd = _pairs(tl.load(sin + at, mask=inside, other=0.0), TOKENS, WIDTH)
        cos_even, cos_odd, sin_even, sin_odd = cos_even * w_even, cos_odd * w_odd, sin_even * w_odd, sin_odd * w_even
    if _ROTATED & STEPS:
        row = tl.arange(0, WIDTH)[:, None]
        signs = tl.load(matrix + row * d + channel, mask=(row < d) & (channel < d), other=0.0)
    times = size if _ROTATED & STEPS else 1.0
    if ROUND:
        times *= tl.load(factor)
    for i in range(HEADS):
        head = group * HEADS + i
        here = (token < tokens)[:, None] & (channel < tl.where(head < heads, d, 0))
        even, odd = _pairs(tl.load(x + of_x + head * x_head, mask=here, other=0.0), TOKENS, WIDTH)
        if _NORM & STEPS:
            spread = tl.rsqrt(tl.sum(even * even + odd * odd, 1) / d + epsilon)[:, None]
            even, odd = even * spread, odd * spread
        if _ROTARY & STEPS:
            even, odd = even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd
        elif _WEIGHT & STEPS:
            even, odd = even * w_even, odd * w_odd
        z = tl.reshape(tl.join(even, odd), (TOKENS, WIDTH))
        if _ROTATED & STEPS:
            z = tl.dot(z.to(tl.bfloat16), signs)
        if ROUND or _ROTATED & STEPS:
            z *= times
        if ROUND:
            z = tl.clamp(z, -_LARGEST, _LARGEST)
        tl.store(y + of_y + head * d, z.to(y.dtype.element_ty), mask=here)


@triton.jit
def heads_kernel(
    x_0, x_1, x_2, weight_0, weight_1, weight_2, y_0, y_1, y_2, cos, sin, factors, matrix, tokens, first, all_tokens, heads,
    x_sample, x_token, x_head, epsilon, size, STEPS_0: tl.constexpr, STEPS_1: tl.constexpr, STEPS_2: tl.constexpr,
    d: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Up to three parts, one after another along axis 1 of the grid, each of GROUPS groups of HEADS heads.

    first: place of x's first token among all of y's. WIDTH: d, padded. R is `matrix` [d, d] of signs, times `size`. factors: f
    of each part.
    """
    part, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    factor = factors + part
    if part == 2:
        _made(x_2, weight_2, cos, sin, factor, matrix, size, y_2, group, tokens, first,
              all_tokens, heads, x_sample, x_token, x_head, epsilon, STEPS_2, d, WIDTH, ROUND, TOKENS, HEADS)  # fmt: skip
    elif STEPS_0 == STEPS_1:
        x, weight, y = x_0, weight_0, y_0
        if part == 1:
            x, weight, y = x_1, weight_1, y_1
        _made(x, weight, cos, sin, factor, matrix, size, y, group, tokens, first,
              all_tokens, heads, x_sample, x_token, x_head, epsilon, STEPS_0, d, WIDTH, ROUND, TOKENS, HEADS)  # fmt: skip
    elif part == 1:
        _made(x_1, weight_1, cos, sin, factor, matrix, size, y_1, group, tokens, first,
              all_tokens, heads, x_sample, x_token, x_head, epsilon, STEPS_1, d, WIDTH, ROUND, TOKENS, HEADS)  # fmt: skip
    else:
        _made(x_0, weight_0, cos, sin, factor, matrix, size, y_0, group, tokens, first,
              all_tokens, heads, x_sample, x_token, x_head, epsilon, STEPS_0, d, WIDTH, ROUND, TOKENS, HEADS)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """Queries, keys or values.

    pieces: [B, T_i, h, d]. steps: a sum of NORM, WEIGHT, ROTARY and ROTATED. weights: of the norm [d], one a piece, or none.
    """

    pieces: Sequence[Tensor]
    steps: int
    weights: Sequence[Tensor] = ()
    epsilon: float = 0.0


class Tile(NamedTuple):
    """Tokens and heads of a program, and its warps."""

    tokens: int
    heads: int
    warps: int


def tile_of(width: int, rotated: bool, capability: int) -> Tile:
    """What was fastest on an H100 with heads of 128 channels. width: padded. capability: of the GPU, 90 for 9.0.

    A rotation of fewer tokens would do without the tensor cores' larger tiles. A thread of the four warps needs all of a
    Hopper GPU's registers and a few numbers more, which still takes less time than eight warps do; elsewhere it is many more.
    """
    return Tile(64 * 128 // max(width, 128), 8, 4 if capability == 90 else 8) if rotated else Tile(16, 4, 4)


def launch(
    parts: Sequence[Part], cos: Tensor | None, sin: Tensor | None, factors: Tensor | None, y: Sequence[Tensor]
) -> None:
    """Fill y [B, T, h, d] of each part, of which channels lie side by side. factors: float32, f of each part, to round by."""
    device = y[0].device
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    number, capability = 0, 10 * major + minor
    for alike in _alike(parts):
        first, stop = 0, number + len(alike)
        of_these = None if factors is None else factors[number:stop]
        for piece, x in enumerate(alike[0].pieces):
            values, constants, grid = arguments(alike, piece, cos, sin, of_these, y[number:stop], first, capability)
            heads_kernel[grid](*values, **constants)
            first += x.shape[1]
        number = stop


def _alike(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Those next to each other that one launch can make."""

    def form(part: Part) -> object:
        return [(x.shape, x.stride(), x.dtype) for x in part.pieces]

    made: list[Part] = []
    for part in parts:
        epsilons = {other.epsilon for other in (*made, part) if other.steps & NORM}
        if made and (len(made) == PARTS or form(part) != form(made[0]) or len(epsilons) > 1):
            yield made
            made = []
        made.append(part)
    yield made


def arguments(
    parts: Sequence[Part], piece: int, cos: Tensor | None, sin: Tensor | None, factors: Tensor | None, y: Sequence[Tensor],
    first: int, capability: int,
) -> tuple[list[Tensor | int | float], dict[str, object], tuple[int, int, int]]:  # fmt: skip
    """(what the kernel takes, what it is compiled for, the grid) for one piece, whose first token has that place in y."""
    last, numbers = len(parts) - 1, range(PARTS)
    x = [parts[min(number, last)].pieces[piece] for number in numbers]
    steps = [parts[min(number, last)].steps for number in numbers]
    weights = [part.weights[piece] if part.steps & WEIGHT else x[0] for part in parts]
    samples, tokens, heads, width = x[0].shape
    padded = max(triton.next_power_of_2(width), _LEAST)
    rotated = any(step & ROTATED for step in steps)
    matrix, size = signs_of_heads(width, x[0].device) if rotated else (x[0], 1.0)
    values: list[Tensor | int | float] = [
        *x,
        *(weights[min(number, last)] for number in numbers),
        *(y[min(number, last)] for number in numbers),
        *(x[0] if table is None else table for table in (cos, sin, factors)),
        matrix,
        *(tokens, first, y[0].shape[1], heads),
        *x[0].stride()[:3],
        max((part.epsilon for part in parts if part.steps & NORM), default=0.0),
        size,
    ]
    tile = tile_of(padded, rotated, capability)
    groups = triton.cdiv(heads, tile.heads)
    constants = {
        "STEPS_0": steps[0], "STEPS_1": steps[1], "STEPS_2": steps[2], "d": width, "WIDTH": padded,
        "ROUND": factors is not None, "TOKENS": tile.tokens, "HEADS": tile.heads, "GROUPS": groups, "num_warps": tile.warps,
    }  # fmt: skip
    return values, constants, (triton.cdiv(tokens, tile.tokens), groups * len(parts), samples)


def heads_meaning(part: Part, cos: Tensor | None, sin: Tensor | None, factor: Tensor | None) -> Tensor:
    """y [B, T, h, d] in float64, before it is rounded to what it is stored in."""
    normed = []
    for number, x in enumerate(part.pieces):
        z = x.double()
        if part.steps & NORM:
            z = z * (z.square().mean(-1, keepdim=True) + part.epsilon).rsqrt()
        normed.append(z * part.weights[number].double() if part.steps & WEIGHT else z)
    z = torch.cat(normed, 1)
    if part.steps & ROTARY:
        assert cos is not None and sin is not None
        even, odd = z.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), -1).flatten(-2)
        z = z * cos.double()[:, None] + turned * sin.double()[:, None]
    if part.steps & ROTATED:
        signs, size = signs_of_heads(z.shape[-1], z.device)
        z = z.float().to(torch.bfloat16).double() @ signs.double() * size
    return z if factor is None else (z * factor.double()).clamp(-LARGEST[FLOAT8], LARGEST[FLOAT8])


@custom_op("ditq::heads", mutates_args=())
def heads(
    pieces: Sequence[Tensor],
    counts: Sequence[int],
    steps: Sequence[int],
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    cos: Tensor | None,
    sin: Tensor | None,
    factors: Tensor | None,
) -> list[Tensor]:
    """Of each part [B, T, h, d], in e4m3 where there are `factors`, one a part, else in the pieces' dtype.

    pieces: [B, T_i, h, d], so many of each part as `counts` says. weights: of the parts whose steps have one, one a piece.
    cos and sin have T d numbers, in any shape. On a CPU the meaning is computed.
    """
    parts, given, own = [], iter(pieces), iter(weights)
    for count, step, epsilon in zip(counts, steps, epsilons, strict=True):
        rows = [piece if piece.stride(-1) == 1 else piece.contiguous() for piece in (next(given) for _ in range(count))]
        parts.append(Part(rows, step, [next(own).contiguous() for _ in range(count)] if step & WEIGHT else [], epsilon))
    made = _empty(pieces, counts, factors)
    width = pieces[0].shape[-1]
    cos, sin = (None if table is None else table.reshape(-1, width).contiguous() for table in (cos, sin))
    if pieces[0].is_cuda:
        launch(parts, cos, sin, factors, made)
        return made
    for number, (part, y) in enumerate(zip(parts, made, strict=True)):
        y.copy_(heads_meaning(part, cos, sin, None if factors is None else factors[number]).float())
    return made


@cache
def signs_of_heads(width: int, device: torch.device) -> tuple[Tensor, float]:
    """(signs [d, d] in bfloat16, 0 between its blocks, their common size) of numerics' `rotation_of_heads`."""
    matrix = rotation_of_heads(width)
    return matrix.sign().to(device, torch.bfloat16), float(matrix.abs().max())


def _empty(pieces: Sequence[Tensor], counts: Sequence[int], factors: Tensor | None) -> list[Tensor]:
    found, start = [], 0
    for count in counts:
        of_part = pieces[start : start + count]
        samples, _, heads, width = of_part[0].shape
        shape = (samples, sum(piece.shape[1] for piece in of_part), heads, width)
        found.append(of_part[0].new_empty(shape, dtype=of_part[0].dtype if factors is None else E4M3))
        start += count
    return found


@heads.register_fake
def _(pieces, counts, steps, weights, epsilons, cos, sin, factors):  # type: ignore[no-untyped-def]
    return _empty(pieces, counts, factors)
