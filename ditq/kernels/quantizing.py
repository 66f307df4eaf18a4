"""How a token is brought in front of a product, chunk by chunk in registers: the parts of quantize.py's kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from ditq.kernels.activation import activated
from ditq.numerics.uniform import SMALLEST_SCALE

_SMALLEST = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _rotated(z, matrix, SIGNS: tl.constexpr):
    """z [a, b] times matrix [b, b], float32."""
    if SIGNS and z.dtype == tl.bfloat16:
        product = tl.dot(z, matrix)
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
def _sums(left, left_squares, right, right_squares):
    return left + right, left_squares + right_squares


@triton.jit
def moments(away, squares, epsilon, n: tl.constexpr):
    """(mean, 1 / standard deviation) as a layer norm has them, of sums [ROWS, B] of z - pivot and of its square.

    The pivot is the token's first channel, so that a mean far from 0 does not cost the digits of the variance. It is what
    the mean is away from it.
    """
    away, squares = tl.reduce((away, squares), 1, _sums)
    away, squares = tl.reduce((away, squares), 0, _sums)
    away = away / n
    return away, tl.rsqrt(tl.maximum(squares / n - away * away, 0.0) + epsilon)


@triton.jit
def places(
    NUMBER: tl.constexpr, a: tl.constexpr, b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, OWN: tl.constexpr
):
    """(rows [ROWS, 1] of Z in the chunk of that number, their channels, which of them there are). None is of x and the tail."""
    OF_X: tl.constexpr = (OWN + ROWS - 1) // ROWS
    start: tl.constexpr = NUMBER * ROWS if NUMBER < OF_X else OWN + (NUMBER - OF_X) * ROWS
    stop: tl.constexpr = OWN if NUMBER < OF_X else a
    i, j = start + tl.arange(0, ROWS)[:, None], tl.arange(0, B)[None, :]
    return i, i * b + j, (i < stop) & (j < b)


@triton.jit
def read(
    NUMBER: tl.constexpr, x, tail, a: tl.constexpr, b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, OWN: tl.constexpr
):  # fmt: skip
    """A chunk [ROWS, B] of the token as it came."""
    _, channel, inside = places(NUMBER, a, b, ROWS, B, OWN)
    if NUMBER * ROWS < OWN:
        z = tl.load(x + channel, mask=inside, other=0.0)
    else:
        z = tl.load(tail + channel, mask=inside, other=0.0)
    return z


@triton.jit
def _modulation(piece, sample, channel, inside, n: tl.constexpr, BEYOND: tl.constexpr, GIVEN: tl.constexpr):
    return tl.load(piece + sample * n + channel, mask=inside, other=BEYOND) if GIVEN else 0.0


@triton.jit
def _unrotated(
    z, times, sample, channel, inside, pivot, mean, spread, gamma, beta, inverse_scale, shift, epsilon, n: tl.constexpr,
    NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr,
    SHIFTED: tl.constexpr, HALF: tl.constexpr, TIMES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A chunk as it came -> as it is in front of the rotation. WHOLE: it is all of the token, and tells its moments.

    Where there are no channels, gamma is taken for -1, which leaves 0 of what the norm made there.
    """
    # Asked for before the norm is known, for which all of the token is waited for.
    scaled = _modulation(gamma, sample, channel, inside, n, -1.0, GAMMA)
    added = _modulation(beta, sample, channel, inside, n, 0.0, BETA)
    if TIMES:
        z = (z.to(tl.float32) * tl.load(times)).to(tl.bfloat16)
    if not HALF:
        z = z.to(tl.float32)
    if NORM:
        z = z.to(tl.float32) - pivot
        if WHOLE:
            away = tl.where(inside, z, 0.0)
            mean, spread = moments(away, away * away, epsilon, n)
        z = z * spread - mean * spread
        if not GAMMA:
            z = tl.where(inside, z, 0.0)
    if GAMMA:
        z = z * (1.0 + scaled.to(tl.float32))
    if BETA:
        z = z + added.to(tl.float32)
    if ACTIVATION != "":
        z = activated(z.to(tl.float32), ACTIVATION)
    if SCALED:
        z = z * tl.load(inverse_scale + channel, mask=inside, other=0.0)
    if SHIFTED:
        z = z - tl.load(shift + channel, mask=inside, other=0.0)
    return z


@triton.jit
def _turned(
    z, i, matrix, second, size, a: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, SIGNS: tl.constexpr,
    START: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    """A chunk in front of the rotation -> behind it, but for a factor of all; transposed by a full rotation."""
    if STEPS == 2:
        k, c = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        other = tl.load(second + k * a + c, mask=(k < a) & (c < a), other=0.0)
        z = _rotated(_rotated(z, matrix, SIGNS).T, other, SIGNS)
    elif STEPS == 1:
        if a == STOP - START:
            z = _rotated(z, matrix, SIGNS)
        else:
            z = tl.where((i >= START) & (i < STOP), _rotated(z, matrix, SIGNS) * size, z.to(tl.float32))
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
    """Store a chunk, z times the factor, and its numbers at scale s, one for all or with groups [ROWS] one a row."""
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
def chunk(
    NUMBER: tl.constexpr, z, largest, x, tail, times, s, token, sample, pivot, mean, spread, gamma, beta,
    inverse_scale, shift, matrix, second, q, scales, kept, size, factor, epsilon, divisor, offset, n: tl.constexpr,
    a: tl.constexpr, b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
    BETA: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, STEPS: tl.constexpr,
    SIGNS: tl.constexpr, HALF: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr, GRID: tl.constexpr, MAXIMUM: tl.constexpr,
    GRANULARITY: tl.constexpr, KEEP: tl.constexpr, OWN: tl.constexpr, TIMES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Store the chunks from NUMBER on, of which z is the first as it came, and return their scale.

    largest: [ROWS, B], of the chunks before. Each chunk stays in registers until those behind it are known as well.
    """
    following = z
    if NUMBER + 1 < CHUNKS:  # read while this one is computed
        following = read(NUMBER + 1, x, tail, a, b, ROWS, B, OWN)
    i, channel, inside = places(NUMBER, a, b, ROWS, B, OWN)
    OF_X: tl.constexpr = NUMBER * ROWS < OWN
    OF_TAIL_ALONE: tl.constexpr = a > OWN  # the activation
    z = _unrotated(z, times, sample, channel, inside, pivot, mean, spread, gamma, beta, inverse_scale, shift, epsilon, n, NORM,
                   GAMMA, BETA, "" if OF_TAIL_ALONE and OF_X else ACTIVATION, SCALED, SHIFTED, HALF, TIMES and OF_X,
                   CHUNKS == 1)  # fmt: skip
    if HALF and SIGNS and STEPS > 0 and a == STOP - START:
        z = z.to(tl.bfloat16)
    turned = _turned(z, i, matrix, second, size, a, ROWS, STEPS, SIGNS, START, STOP)
    row = tl.max(i, 1)
    there = row < (OWN if OF_X else a)
    if STEPS == 2:
        k, c = tl.arange(0, B)[:, None], tl.arange(0, ROWS)[None, :]  # it lies transposed now
        channel, inside = k * a + c, (k < b) & (c < a)
    if GRANULARITY == "token":
        magnitude = _magnitude(turned, inside, factor, offset, GRID)
        if NUMBER > 0:
            magnitude = tl.maximum(largest, magnitude)
        if NUMBER + 1 == CHUNKS:
            s = _scale(tl.max(magnitude), factor, divisor, GRID)
        else:
            s = chunk(NUMBER + 1, following, magnitude, x, tail, times, s, token, sample, pivot, mean, spread, gamma,
                      beta, inverse_scale, shift, matrix, second, q, scales, kept, size, factor, epsilon, divisor, offset, n, a,
                      b, ROWS, B, NORM, GAMMA, BETA, ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP, GRID,
                      MAXIMUM, GRANULARITY, KEEP, OWN, TIMES, CHUNKS)  # fmt: skip
    elif GRANULARITY == "group":
        s = _scale(tl.max(_magnitude(turned, inside, factor, offset, GRID), 1), factor, divisor, GRID)
    _written(turned, channel, inside, row, there, token, s, q, scales, kept, factor, offset, n, a, GRID, MAXIMUM, GRANULARITY,
             KEEP)  # fmt: skip
    if GRANULARITY != "token" and NUMBER + 1 < CHUNKS:
        chunk(NUMBER + 1, following, 0.0, x, tail, times, s, token, sample, pivot, mean, spread, gamma, beta,
              inverse_scale, shift, matrix, second, q, scales, kept, size, factor, epsilon, divisor, offset, n, a, b, ROWS, B,
              NORM, GAMMA, BETA, ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP, GRID, MAXIMUM, GRANULARITY,
              KEEP, OWN, TIMES, CHUNKS)  # fmt: skip
    return s
