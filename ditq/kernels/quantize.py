"""Everything in front of a product in one pass over the tokens: norm, modulation or activation, transform, rounding.

    z  = x                                      what comes in, [M, n]
       | layer_norm(x) (1 + gamma) + beta       gamma, beta [B, n] of each sample's modulation, either may be absent
       | gelu(x), and the like
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
    """x to the next whole number, half to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _places(chunk, a: tl.constexpr, b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr):
    """(rows [ROWS, 1] of Z in a chunk, their channels, which of them there are)."""
    i, j = chunk * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, B)[None, :]
    return i, i * b + j, (i < a) & (j < b)


@triton.jit
def _moments(
    x, epsilon, n: tl.constexpr, a: tl.constexpr, b: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """(mean, 1 / standard deviation) of a token, as a layer norm has them."""
    total = tl.zeros((ROWS, B), tl.float32)
    if CHUNKS == 1:
        _, channel, inside = _places(0, a, b, ROWS, B)
        z = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(z, 1), 0) / n
        z = tl.where(inside, z - mean, 0.0)
        total += z * z
    else:
        for chunk in range(CHUNKS):
            _, channel, inside = _places(chunk, a, b, ROWS, B)
            total += tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(total, 1), 0) / n
        total = tl.zeros((ROWS, B), tl.float32)
        for chunk in range(CHUNKS):
            _, channel, inside = _places(chunk, a, b, ROWS, B)
            z = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
            z = tl.where(inside, z - mean, 0.0)
            total += z * z
    return mean, tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / n + epsilon)


@triton.jit
def _moved(
    z, i, channel, inside, sample, mean, spread, gamma, beta, inverse_scale, shift, matrix, size,
    n: tl.constexpr, a: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr, BETA: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr, SHIFTED: tl.constexpr, STEPS: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr,
    START: tl.constexpr, STOP: tl.constexpr,
):  # fmt: skip
    """Rows of the token as they came -> as they are after the first step of the rotation, or without one after all of it."""
    if not HALF:
        z = z.to(tl.float32)
    if NORM:
        z = tl.where(inside, (z.to(tl.float32) - mean) * spread, 0.0)
    if GAMMA:
        z = z * (1.0 + tl.load(gamma + sample * n + channel, mask=inside, other=0.0).to(tl.float32))
    if BETA:
        z = z + tl.load(beta + sample * n + channel, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        z = activated(z.to(tl.float32), ACTIVATION)
    if SCALED:
        z = z * tl.load(inverse_scale + channel, mask=inside, other=0.0)
    if SHIFTED:
        z = z - tl.load(shift + channel, mask=inside, other=0.0)
    if STEPS == 2:
        z = _rotated(z, matrix, SIGNS, HALF)
    elif STEPS == 1:
        rotated = _rotated(z, matrix, SIGNS, HALF) * size
        if START == 0 and STOP == a:
            z = rotated
        else:
            z = tl.where((i >= START) & (i < STOP), rotated, z.to(tl.float32))
    return z.to(tl.float32)


@triton.jit
def _magnitude(z, inside, offset, GRID: tl.constexpr):
    """What the largest of decides on the scale of a token."""
    return tl.where(inside, z + offset, float("-inf")) if GRID == "unsigned" else tl.abs(z)


@triton.jit
def _written(
    z, channel, inside, row, there, token, s, q, scales, kept, offset, maximum, n: tl.constexpr, a: tl.constexpr,
    GRID: tl.constexpr, GRANULARITY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store rows of the transformed token, and their numbers at scale s, one for all or with groups [ROWS] one a row."""
    if KEEP:
        tl.store(kept + token * n + channel, z.to(kept.dtype.element_ty), mask=inside)
    if GRID != "":
        if GRID == "unsigned":
            z = tl.where(inside, z + offset, 0.0)
        if GRANULARITY == "group":
            steps = z * (1.0 / s)[:, None]
        else:
            steps = z * (1.0 / s)
        if GRID == "midrise":
            number = 2.0 * _nearest(tl.minimum(tl.maximum(steps - 0.5, -maximum), maximum - 1.0)) + 1.0
        elif GRID == "unsigned":
            number = _nearest(tl.minimum(tl.maximum(steps, 0.0), maximum))
        elif GRID == "float8_e4m3":
            number = tl.minimum(tl.maximum(steps, -maximum), maximum)
        else:
            number = _nearest(tl.minimum(tl.maximum(steps, -maximum), maximum))
        tl.store(q + token * n + channel, number.to(q.dtype.element_ty), mask=inside)
        if GRANULARITY == "group":
            tl.store(scales + token * a + row, s * 0.5 if GRID == "midrise" else s, mask=there)


@triton.jit
def quantize_kernel(
    x, gamma, beta, inverse_scale, shift, first, second, calibrated, q, scales, kept,
    size, epsilon, divisor, offset, maximum, tokens_a_sample,
    n: tl.constexpr, a: tl.constexpr, b: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr,
    GAMMA: tl.constexpr, BETA: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    STEPS: tl.constexpr, SIGNS: tl.constexpr, HALF: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr,
    GRID: tl.constexpr, GRANULARITY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One token, in chunks of ROWS rows of b channels. B: b padded to a power of two. GRID '': only `kept` is written.

    A token of several chunks is read, from the cache, and transformed once more for each thing that must be known of all of
    it; that costs less than registers for the whole token would, as the few tokens that then fit wait for memory.
    """
    token = tl.program_id(0).to(tl.int64)
    sample = token // tokens_a_sample
    CHUNKS: tl.constexpr = (a + ROWS - 1) // ROWS
    matrix = 0.0
    if STEPS > 0:
        p, r = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
        matrix = tl.load(first + p * b + r, mask=(p < b) & (r < b), other=0.0)
    mean, spread = 0.0, 1.0
    if NORM:
        mean, spread = _moments(x + token * n, epsilon, n, a, b, CHUNKS, ROWS, B)
    s = 1.0
    if GRANULARITY == "tensor":
        s = tl.load(calibrated)
    if CHUNKS > 1 and GRANULARITY == "token":
        largest = tl.full((ROWS, B), float("-inf"), tl.float32)
        for chunk in range(CHUNKS):
            i, channel, inside = _places(chunk, a, b, ROWS, B)
            z = tl.load(x + token * n + channel, mask=inside, other=0.0)
            z = _moved(z, i, channel, inside, sample, mean, spread, gamma, beta, inverse_scale, shift, matrix, size,
                       n, a, NORM, GAMMA, BETA, ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP)  # fmt: skip
            largest = tl.maximum(largest, _magnitude(z, inside, offset, GRID))
        s = tl.maximum(tl.max(tl.max(largest, 1), 0) / divisor, _SMALLEST)
    for chunk in range(CHUNKS):
        i, channel, inside = _places(chunk, a, b, ROWS, B)
        z = tl.load(x + token * n + channel, mask=inside, other=0.0)
        z = _moved(z, i, channel, inside, sample, mean, spread, gamma, beta, inverse_scale, shift, matrix, size,
                   n, a, NORM, GAMMA, BETA, ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP)  # fmt: skip
        if STEPS == 2:
            k, c = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
            other = tl.load(second + k * a + c, mask=(k < a) & (c < a), other=0.0)
            z = _rotated(z.T, other, SIGNS, False) * size
            i, j = tl.arange(0, B)[:, None], tl.arange(0, ROWS)[None, :]  # it lies transposed now
            channel, inside = i * a + j, (i < b) & (j < a)
        if CHUNKS == 1 and GRANULARITY == "token":
            s = tl.maximum(tl.max(tl.max(_magnitude(z, inside, offset, GRID), 1), 0) / divisor, _SMALLEST)
        row = chunk * ROWS + tl.arange(0, ROWS)
        if GRANULARITY == "group":
            each = tl.maximum(tl.max(_magnitude(z, inside, offset, GRID), 1) / divisor, _SMALLEST)
            _written(z, channel, inside, row, row < a, token, each, q, scales, kept, offset, maximum, n, a, GRID, GRANULARITY,
                     KEEP)  # fmt: skip
        else:
            _written(z, channel, inside, row, row < a, token, s, q, scales, kept, offset, maximum, n, a, GRID, GRANULARITY,
                     KEEP)  # fmt: skip
    if GRANULARITY != "group" and GRID != "":
        tl.store(scales + token, s * 0.5 if GRID == "midrise" else s)


@dataclass(frozen=True, eq=False)
class Before:
    """What stands between the tensor that is read and the transform: a norm with its modulation, or an activation.

    gamma, beta [B, n]: of each sample, or None. epsilon: of the norm.
    """

    norm: bool = False
    gamma: Tensor | None = None
    beta: Tensor | None = None
    activation: str = ""
    epsilon: float = 1e-6


def arguments(
    x: Tensor,
    tokens_a_sample: int,
    before: Before,
    plan: Online,
    q: Tensor | None,
    scales: Tensor | None,
    kept: Tensor | None,
    cut: Cut | None = None,
) -> tuple[list[Tensor | int | float], dict[str, object]]:
    """(what the kernel takes, what it is compiled for) for tokens x [M, n]."""
    form = plan.form
    grid = "" if q is None else form.grid
    given = (x, before.gamma, before.beta, plan.inverse_scale, plan.shift, plan.first, plan.second, plan.calibrated)
    values: list[Tensor | int | float] = [x if tensor is None else tensor for tensor in (*given, q, scales, kept)]
    divisor = form.divisor if q is not None else 1.0
    values += [
        plan.size,
        before.epsilon,
        divisor,
        form.shift,
        float(form.maximum if q is not None else 1),
        tokens_a_sample,
    ]
    cut, B = cut or cut_of(plan), max(triton.next_power_of_2(plan.b), 16)
    constants = {
        "n": plan.width, "a": plan.a, "b": plan.b, "ROWS": cut.rows, "B": B, "NORM": before.norm,
        "GAMMA": before.gamma is not None,
        "BETA": before.beta is not None, "ACTIVATION": before.activation, "SCALED": plan.inverse_scale is not None,
        "SHIFTED": plan.shift is not None, "STEPS": (plan.first is not None) + (plan.second is not None),
        "SIGNS": plan.first is not None and plan.first.dtype == torch.bfloat16, "HALF": x.dtype == torch.bfloat16,
        "START": plan.start, "STOP": plan.stop, "GRID": grid, "GRANULARITY": form.granularity, "KEEP": kept is not None,
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
) -> None:
    """Fill q [M, n] and scales [M], or [M, G] for groups of channels, and `kept` [M, n], the transformed input."""
    values, constants = arguments(x, tokens_a_sample, before, plan, q, scales, kept, cut)
    quantize_kernel[(x.shape[0],)](*values, **constants)


def number_type(form: ActivationFormat) -> torch.dtype:
    """What the numbers q of a format are stored in."""
    return E4M3 if form.grid == "float8_e4m3" else torch.int8


def before_meaning(x: Tensor, tokens_a_sample: int, before: Before) -> Tensor:
    """z in float64."""
    z = x.double()
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
        for start, stop, rotation in transform.rotations if x.dtype == torch.bfloat16 else ():
            step = rotation.steps[0]
            if isinstance(step, BlockStep) and matrix_of(step)[0].dtype == torch.bfloat16:
                z[:, start:stop] = z[:, start:stop].to(torch.bfloat16)
        z = InputTransform(rotations=transform.rotations)(z)
    if form.granularity == "none":
        return z, None, None
    scale = form.scale_of(z, calibrated)
    return z, form.steps(z, scale), scale
