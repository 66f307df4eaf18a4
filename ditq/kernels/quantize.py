"""Everything in front of a product in one pass over the tokens: norm, modulation or activation, transform, rounding.

    z  = x                                      what comes in, [M, n]
       | layer_norm(x) (1 + gamma) + beta       gamma, beta [B, n] of each sample's modulation, either may be absent
       | gelu(x), and the like
       | concat(x, tail), concat(x, gelu(tail)) of tensors of their own
    x' = (z inverse_scale - shift) R            numerics: ditq/nn/input_transform.py
    q  = round(x' / s)                          the grids of ditq/numerics/activation_format.py

A program takes one token, as a matrix Z [a, b] in registers. R is a block step, Z M_1 with one matrix for the b channels of
each row (of the rows of a range), or two with the stride between them, (Z M_1)^T M_2, a full Hadamard rotation. Matrices of
signs are exact in bfloat16, to which z is rounded where x is of it: once; a model in bfloat16 rounds it after each operation.

`quantize_meaning` is the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels.activation import activated, activation_meaning
from ditq.kernels.online import Cut, Online, cut_of, matrix_of
from ditq.nn.input_transform import InputTransform
from ditq.numerics.activation_format import FLOAT, ActivationFormat
from ditq.numerics.carrier import E4M3
from ditq.numerics.rotation import BlockStep
from ditq.numerics.uniform import SMALLEST_SCALE

_SMALLEST = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _rotated(z, matrix, SIGNS: tl.constexpr, HALF: tl.constexpr):
    """z [a, b] times matrix [b, b], float32. HALF: z is rounded to bfloat16, if it is not of it."""
    if SIGNS and HALF:
        product = tl.dot(z.to(tl.bfloat16), matrix)
    elif SIGNS:
        product = tl.dot(z.to(tl.float32), matrix.to(tl.float32), input_precision="tf32")
    else:
        product = tl.dot(z.to(tl.float32), matrix, input_precision="tf32x3")
    return product


@triton.jit
def _nearest(x):
    """The next whole number, half to even, in the low 22 bits, for |x| < 2^21: beside 1.5 * 2^23 a fraction has no room."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _places(chunk, start, stop, b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr):
    """(rows [ROWS, 1] of Z in a chunk of those from start to stop, their channels, which of them there are)."""
    i, j = start + chunk * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, B)[None, :]
    return i, i * b + j, (i < stop) & (j < b)


@triton.jit
def _sums(left, left_squares, right, right_squares):
    return left + right, left_squares + right_squares


@triton.jit
def _moments(away, squares, epsilon, n: tl.constexpr):
    """(mean, 1 / standard deviation) as a layer norm has them, of sums [ROWS, B] of z - pivot and of its square.

    The pivot is the token's first channel, so that a mean far from 0 does not cost the digits of the variance. It is what
    the mean is away from it.
    """
    away, squares = tl.reduce((away, squares), 1, _sums)
    away, squares = tl.reduce((away, squares), 0, _sums)
    away = away / n
    return away, tl.rsqrt(tl.maximum(squares / n - away * away, 0.0) + epsilon)


@triton.jit
def _read(x, channel, inside, times, TIMES: tl.constexpr):
    z = tl.load(x + channel, mask=inside, other=0.0)
    if TIMES:
        z = (z.to(tl.float32) * tl.load(times)).to(tl.bfloat16)
    return z


@triton.jit
def _modulation(piece, sample, channel, inside, n: tl.constexpr, BEYOND: tl.constexpr, GIVEN: tl.constexpr):
    return tl.load(piece + sample * n + channel, mask=inside, other=BEYOND) if GIVEN else 0.0


@triton.jit
def _moved(
    z, i, channel, inside, pivot, mean, spread, gamma, beta, inverse_scale, shift, matrix, size,
    a: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr, SHIFTED: tl.constexpr, STEPS: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr,
    START: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    """Rows of the token as they came -> as they are after the first step of the rotation, but for a factor of all, or
    without one after all of it.

    gamma, beta: of these channels; gamma is -1 where there is none, which leaves 0 of what the norm made there.
    """
    if not HALF:
        z = z.to(tl.float32)
    if NORM:
        z = (z.to(tl.float32) - pivot) * spread - mean * spread
        if not GAMMA:
            z = tl.where(inside, z, 0.0)
    if GAMMA:
        z = z * (1.0 + gamma.to(tl.float32))
    if BETA:
        z = z + beta.to(tl.float32)
    if ACTIVATION != "":
        z = activated(z.to(tl.float32), ACTIVATION)
    if SCALED:
        z = z * tl.load(inverse_scale + channel, mask=inside, other=0.0)
    if SHIFTED:
        z = z - tl.load(shift + channel, mask=inside, other=0.0)
    if STEPS == 2:
        z = _rotated(z, matrix, SIGNS, HALF)
    elif STEPS == 1:
        rotated = _rotated(z, matrix, SIGNS, HALF)
        if START == 0 and STOP == a:
            z = rotated
        else:
            z = tl.where((i >= START) & (i < STOP), rotated * size, z.to(tl.float32))
    return z.to(tl.float32)


@triton.jit
def _magnitude(z, inside, factor, offset, GRID: tl.constexpr):
    """What the largest of decides on the scale, of z times the factor."""
    return tl.where(inside, z * factor + offset, float("-inf")) if GRID == "unsigned" else tl.abs(z)


@triton.jit
def _scale(largest, factor, divisor, GRID: tl.constexpr):
    """Of such a largest."""
    if GRID != "unsigned":
        largest *= factor
    return tl.maximum(largest / divisor, _SMALLEST)


@triton.jit
def _written(
    z, channel, inside, row, there, token, s, q, scales, kept, factor, offset, n: tl.constexpr, a: tl.constexpr,
    GRID: tl.constexpr, MAXIMUM: tl.constexpr, GRANULARITY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store rows z of the token, times the factor, and their numbers at scale s, one for all or with groups [ROWS] one a row."""
    if KEEP:
        tl.store(kept + token * n + channel, (z * factor).to(kept.dtype.element_ty), mask=inside)
    if GRID != "":
        if GRID == "unsigned":
            z = tl.where(inside, z * factor + offset, 0.0)
            factor = 1.0
        if GRANULARITY == "group":
            steps = z * (factor / s)[:, None]
        else:
            steps = z * (factor / s)
        if GRID == "midrise":
            number = 2 * _nearest(tl.clamp(steps - 0.5, -MAXIMUM, MAXIMUM - 1.0)) + 1
        elif GRID == "unsigned":
            number = _nearest(tl.clamp(steps, 0.0, MAXIMUM))
        elif GRID == "float8_e4m3":
            number = tl.clamp(steps, -MAXIMUM, MAXIMUM)
        else:
            number = _nearest(tl.clamp(steps, -MAXIMUM, MAXIMUM))
        tl.store(q + token * n + channel, number.to(q.dtype.element_ty), mask=inside)
        if GRANULARITY == "group":
            tl.store(scales + token * a + row, s * 0.5 if GRID == "midrise" else s, mask=there)


@triton.jit
def _sizes(
    largest, x, times, sample, pivot, mean, spread, gamma, beta, inverse_scale, shift, matrix, size, factor, offset,
    start: tl.constexpr, stop: tl.constexpr, n: tl.constexpr, a: tl.constexpr, b: tl.constexpr, ROWS: tl.constexpr,
    B: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr,
    SHIFTED: tl.constexpr, STEPS: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr, START: tl.constexpr,
    STOP: tl.constexpr, GRID: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """`largest` [ROWS, B] and what decides on the scale in rows start to stop, whose channels lie at x."""
    for chunk in range((stop - start + ROWS - 1) // ROWS):
        i, channel, inside = _places(chunk, start, stop, b, ROWS, B)
        z = _read(x, channel, inside, times, TIMES)
        scaled = _modulation(gamma, sample, channel, inside, n, -1.0, GAMMA)
        added = _modulation(beta, sample, channel, inside, n, 0.0, BETA)
        z = _moved(z, i, channel, inside, pivot, mean, spread, scaled, added, inverse_scale, shift, matrix, size, a, NORM,
                   GAMMA, BETA, ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP)  # fmt: skip
        largest = tl.maximum(largest, _magnitude(z, inside, factor, offset, GRID))
    return largest


@triton.jit
def _rounded(
    x, times, s, token, sample, pivot, mean, spread, gamma, beta, inverse_scale, shift, matrix, second, q, scales, kept, size,
    factor, epsilon, divisor, offset, start: tl.constexpr, stop: tl.constexpr, n: tl.constexpr, a: tl.constexpr,
    b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr,
    ACTIVATION: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, STEPS: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr,
    START: tl.constexpr, STOP: tl.constexpr, GRID: tl.constexpr, MAXIMUM: tl.constexpr, GRANULARITY: tl.constexpr,
    KEEP: tl.constexpr, WHOLE: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """Store rows start to stop, whose channels lie at x, and return their scale. WHOLE: they are all of a token."""
    for chunk in range((stop - start + ROWS - 1) // ROWS):
        i, channel, inside = _places(chunk, start, stop, b, ROWS, B)
        z = _read(x, channel, inside, times, TIMES)
        # Asked for before the norm is known, for which all of the token is waited for.
        scaled = _modulation(gamma, sample, channel, inside, n, -1.0, GAMMA)
        added = _modulation(beta, sample, channel, inside, n, 0.0, BETA)
        if NORM and WHOLE:
            away = tl.where(inside, z.to(tl.float32) - pivot, 0.0)
            mean, spread = _moments(away, away * away, epsilon, n)
        z = _moved(z, i, channel, inside, pivot, mean, spread, scaled, added, inverse_scale, shift, matrix, size, a, NORM,
                   GAMMA, BETA, ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP)  # fmt: skip
        if STEPS == 2:
            k, c = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
            other = tl.load(second + k * a + c, mask=(k < a) & (c < a), other=0.0)
            z = _rotated(z.T, other, SIGNS, False)
            i, j = tl.arange(0, B)[:, None], tl.arange(0, ROWS)[None, :]  # it lies transposed now
            channel, inside = i * a + j, (i < b) & (j < a)
        if WHOLE and GRANULARITY == "token":
            s = _scale(tl.max(tl.max(_magnitude(z, inside, factor, offset, GRID), 1), 0), factor, divisor, GRID)
        row = start + chunk * ROWS + tl.arange(0, ROWS)
        if GRANULARITY == "group":
            each = _scale(tl.max(_magnitude(z, inside, factor, offset, GRID), 1), factor, divisor, GRID)
            _written(z, channel, inside, row, row < stop, token, each, q, scales, kept, factor, offset, n, a, GRID,
                     MAXIMUM, GRANULARITY, KEEP)  # fmt: skip
        else:
            _written(z, channel, inside, row, row < stop, token, s, q, scales, kept, factor, offset, n, a, GRID,
                     MAXIMUM, GRANULARITY, KEEP)  # fmt: skip
    return s


@triton.jit
def quantize_kernel(
    x, tail, gamma, beta, inverse_scale, shift, first, second, calibrated, limits, q, scales, kept, times,
    size, epsilon, tokens_a_sample, x_row, tail_row,
    n: tl.constexpr, a: tl.constexpr, b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr,
    GAMMA: tl.constexpr, BETA: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    STEPS: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr,
    GRID: tl.constexpr, MAXIMUM: tl.constexpr, GRANULARITY: tl.constexpr, KEEP: tl.constexpr, OWN: tl.constexpr,
    TIMES: tl.constexpr,
):  # fmt: skip
    """One token, in chunks of ROWS rows of b channels. B: b padded to a power of two. GRID '': only `kept` is written.

    OWN: rows that are x's; those after it are the tail's, which alone are activated then. x_row, tail_row: from token to token.
    TIMES: x is of FP8 numbers, which are multiplied by `times` first.
    A token of several chunks is read, from the cache, and transformed once more for each thing that must be known of all of
    it; that costs less than registers for the whole token would, as the few tokens that then fit wait for memory.
    """
    token = tl.program_id(0).to(tl.int64)
    sample = token // tokens_a_sample
    x += token * x_row
    tail += token * tail_row - OWN * b
    divisor = tl.load(limits) if GRID != "" else 1.0
    offset = tl.load(limits + 1) if GRID == "unsigned" else 0.0
    WHOLE: tl.constexpr = a <= ROWS and OWN == a
    OF_X: tl.constexpr = ACTIVATION if OWN == a else ""
    matrix = 0.0
    if STEPS > 0:
        p, r = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
        matrix = tl.load(first + p * b + r, mask=(p < b) & (r < b), other=0.0)
    factor = size if STEPS == 2 or (STEPS == 1 and START == 0 and STOP == a) else 1.0
    pivot, mean, spread = 0.0, 0.0, 1.0
    if NORM:
        pivot = tl.load(x).to(tl.float32)
    if NORM and not WHOLE:
        away, squares = tl.zeros((ROWS, B), tl.float32), tl.zeros((ROWS, B), tl.float32)
        for chunk in range((a + ROWS - 1) // ROWS):
            _, channel, inside = _places(chunk, 0, a, b, ROWS, B)
            z = tl.where(inside, tl.load(x + channel, mask=inside, other=0.0).to(tl.float32) - pivot, 0.0)
            away += z
            squares += z * z
        mean, spread = _moments(away, squares, epsilon, n)
    s = 1.0
    if GRANULARITY == "tensor":
        s = tl.load(calibrated)
    if GRANULARITY == "token" and not WHOLE:
        largest = tl.full((ROWS, B), float("-inf"), tl.float32)
        largest = _sizes(largest, x, times, sample, pivot, mean, spread, gamma, beta, inverse_scale, shift, matrix, size,
                         factor, offset, 0, OWN, n, a, b, ROWS, B, NORM, GAMMA, BETA, OF_X, SCALED, SHIFTED, STEPS, SIGNS,
                         HALF, START, STOP, GRID, TIMES)  # fmt: skip
        if OWN < a:
            largest = _sizes(largest, tail, times, sample, pivot, mean, spread, gamma, beta, inverse_scale, shift, matrix, size,
                             factor, offset, OWN, a, n, a, b, ROWS, B, NORM, GAMMA, BETA, ACTIVATION, SCALED, SHIFTED, STEPS,
                             SIGNS, HALF, START, STOP, GRID, False)  # fmt: skip
        s = _scale(tl.max(tl.max(largest, 1), 0), factor, divisor, GRID)
    s = _rounded(x, times, s, token, sample, pivot, mean, spread, gamma, beta, inverse_scale, shift, matrix, second, q, scales,
                 kept, size, factor, epsilon, divisor, offset, 0, OWN, n, a, b, ROWS, B, NORM, GAMMA, BETA, OF_X, SCALED,
                 SHIFTED, STEPS, SIGNS, HALF, START, STOP, GRID, MAXIMUM, GRANULARITY, KEEP, WHOLE, TIMES)  # fmt: skip
    if OWN < a:
        s = _rounded(tail, times, s, token, sample, pivot, mean, spread, gamma, beta, inverse_scale, shift, matrix, second, q,
                     scales, kept, size, factor, epsilon, divisor, offset, OWN, a, n, a, b, ROWS, B, NORM, GAMMA, BETA,
                     ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP, GRID, MAXIMUM, GRANULARITY, KEEP, WHOLE,
                     False)  # fmt: skip
    if GRANULARITY != "group" and GRID != "":
        tl.store(scales + token, s * 0.5 if GRID == "midrise" else s)


@dataclass(frozen=True, eq=False)
class Before:
    """What stands between the tensor that is read and the transform: a norm with its modulation, or an activation.

    gamma, beta [B, n]: of each sample, or None. epsilon: of the norm. times [1]: x, but not the channels behind it, is of FP8
    numbers to be multiplied by it, into bfloat16.
    """

    norm: bool = False
    gamma: Tensor | None = None
    beta: Tensor | None = None
    activation: str = ""
    epsilon: float = 1e-6
    times: Tensor | None = None


def as_read(
    x: Tensor, tail: Tensor | None, plan: Online, times: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [.., k] and the channels behind it [.., n - k] or None, as rows [M, k] and [M, n - k] that the kernel can read; and
    what it multiplies x by.

    Copied only where they do not lie so.
    """
    mixed = tail is not None and times is None and tail.dtype != x.dtype
    if tail is not None and (x.shape[-1] % plan.b or plan.second is not None or mixed):
        x, times = (x, None) if times is None else ((x.float() * times).to(tail.dtype), None)
        x, tail = torch.cat((x, tail), dim=-1), None
    rows = [None if piece is None else piece.flatten(0, -2) for piece in (x, tail)]
    made = [piece if piece is None or piece.stride(-1) == 1 else piece.contiguous() for piece in rows]
    assert made[0] is not None
    return made[0], made[1], times


def arguments(
    x: Tensor,
    tokens_a_sample: int,
    before: Before,
    plan: Online,
    q: Tensor | None,
    scales: Tensor | None,
    kept: Tensor | None,
    cut: Cut | None = None,
    tail: Tensor | None = None,
) -> tuple[list[Tensor | int | float], dict[str, object]]:
    """(what the kernel takes, what it is compiled for) for tokens x [M, n], or as `as_read` takes them."""
    form = plan.form
    grid = "" if q is None else form.grid
    x, tail, times = as_read(x, tail, plan, before.times)
    given = (
        x, tail, before.gamma, before.beta, plan.inverse_scale, plan.shift, plan.first, plan.second, plan.calibrated,
        plan.limits, q, scales, kept, times,
    )  # fmt: skip
    values: list[Tensor | int | float] = [x if tensor is None else tensor for tensor in given]
    values += [plan.size, before.epsilon, tokens_a_sample]
    values += [x.stride(0), 0 if tail is None else tail.stride(0)]
    cut, B = cut or cut_of(plan), max(triton.next_power_of_2(plan.b), 16)
    constants = {
        "n": plan.width, "a": plan.a, "b": plan.b, "ROWS": cut.rows, "B": B, "NORM": before.norm,
        "GAMMA": before.gamma is not None,
        "BETA": before.beta is not None, "ACTIVATION": before.activation, "SCALED": plan.inverse_scale is not None,
        "SHIFTED": plan.shift is not None, "STEPS": (plan.first is not None) + (plan.second is not None),
        "SIGNS": plan.first is not None and plan.first.dtype == torch.bfloat16, "HALF": x.dtype in (torch.bfloat16, E4M3),
        "START": plan.start, "STOP": plan.stop, "GRID": grid, "MAXIMUM": float(form.maximum if grid else 1),
        "GRANULARITY": form.granularity, "KEEP": kept is not None,
        "OWN": plan.a if tail is None else x.shape[1] // plan.b, "TIMES": times is not None,
        "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip
    return values, constants


def launch(
    x: Tensor,
    tokens_a_sample: int,
    before: Before,
    plan: Online,
    q: Tensor | None,
    scales: Tensor | None,
    kept: Tensor | None,
    cut: Cut | None = None,
    tail: Tensor | None = None,
) -> None:
    """Fill q [M, n] and scales [M], or [M, G] for groups of channels, and `kept` [M, n], the transformed input."""
    values, constants = arguments(x, tokens_a_sample, before, plan, q, scales, kept, cut, tail)
    quantize_kernel[(x.numel() // x.shape[-1],)](*values, **constants)


def number_type(form: ActivationFormat) -> torch.dtype:
    """What the numbers q of a format are stored in."""
    return E4M3 if form.grid == "float8_e4m3" else torch.int8


def before_meaning(x: Tensor, tokens_a_sample: int, before: Before) -> Tensor:
    """z in float64."""
    z = x.double() if before.times is None else (x.float() * before.times).to(torch.bfloat16).double()
    if before.norm:
        z = F.layer_norm(z, (z.shape[-1],), eps=before.epsilon)
    sample = torch.arange(len(z), device=z.device) // tokens_a_sample
    z = z if before.gamma is None else z * (1 + before.gamma.double()[sample])
    z = z if before.beta is None else z + before.beta.double()[sample]
    return activation_meaning(z, before.activation)


def quantize_meaning(
    x: Tensor, tokens_a_sample: int, before: Before, transform: InputTransform | None, form: ActivationFormat = FLOAT,
    calibrated: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(x' [M, n], what is rounded: x' in steps of its grid, and s) in float64; no steps and s for inputs in floating point."""
    z = before_meaning(x, tokens_a_sample, before)
    if transform is not None:
        z = InputTransform(transform.inverse_scale, transform.shift)(z)
        for start, stop, rotation in transform.rotations if x.dtype in (torch.bfloat16, E4M3) else ():
            step = rotation.steps[0]
            if isinstance(step, BlockStep) and matrix_of(step)[0].dtype == torch.bfloat16:
                z[:, start:stop] = z[:, start:stop].to(torch.bfloat16)
        z = InputTransform(rotations=transform.rotations)(z)
    if form.granularity == "none":
        return z, None, None
    scale = form.scale_of(z, calibrated)
    return z, form.steps(z, scale), scale
