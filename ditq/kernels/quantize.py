"""Everything in front of a product in one pass over the tokens: norm, modulation or activation, transform, rounding.

    z  = x                                      what comes in, [M, n]
       | layer_norm(x) (1 + gamma) + beta       gamma, beta [B, n] of each sample's modulation, either may be absent
       | gelu(x), and the like
    x' = (z inverse_scale - shift) R            numerics: ditq/nn/input_transform.py
    q  = round(x' / s)                          the grids of ditq/numerics/activation_format.py

A program takes one token, as a matrix Z [a, b] in registers. R is a block step, Z M_1 with one matrix for the b channels of
each row (of the rows of a range), or two with the stride between them, (Z M_1)^T M_2, a full Hadamard rotation. Matrices of
signs are exact in bfloat16; z is then cut into two bfloat16 parts, or one where it is bfloat16 already, so that the products
with them lose nothing that matters to an 8-bit step.

`quantize_meaning` is the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ditq.nn.input_transform import InputTransform
from ditq.numerics.activation_format import FLOAT, ActivationFormat
from ditq.numerics.carrier import E4M3
from ditq.numerics.rotation import BlockStep, PermuteStep, Rotation
from ditq.numerics.uniform import SMALLEST_SCALE

ACTIVATIONS = ("", "gelu_tanh", "gelu", "silu")
_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_WIDEST = 32768  # numbers of a padded token that a program's registers hold
_WIDEST_FULL = 8192  # the same where it is multiplied from both sides


@dataclass(frozen=True, eq=False)
class Online:
    """What a kernel does to the input of a linear: transform and format.

    a, b: the token as a matrix. first [b, b], second [a, a]: matrices, of signs in bfloat16 with their common `size` taken
    out, else float32. start, stop: rows of Z that the first is for.
    """

    width: int
    a: int
    b: int
    first: Tensor | None
    second: Tensor | None
    size: float
    start: int
    stop: int
    inverse_scale: Tensor | None
    shift: Tensor | None
    form: ActivationFormat
    calibrated: Tensor | None = None

    def to(self, device: torch.device) -> Online:
        """The same with its tensors there."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def fingerprint(self) -> str:
        """The same for those that do the same."""
        parts = []
        for value in (getattr(self, f.name) for f in fields(self)):
            tensor = isinstance(value, Tensor)
            parts.append(sha256(value.cpu().flatten().view(torch.uint8).numpy()).hexdigest() if tensor else repr(value))
        return " ".join(parts)


def _matrix(step: BlockStep) -> tuple[Tensor, float]:
    """(entries, common size): signs in bfloat16, or any entries in float32 with size 1."""
    size = float(step.matrix.abs().max())
    if bool(((step.matrix.abs() - size).abs() < 1e-9).all()):
        return step.matrix.sign().to(torch.bfloat16).contiguous(), size
    return step.matrix.float().contiguous(), 1.0


def online(
    transform: InputTransform | None, form: ActivationFormat, calibrated: Tensor | None, width: int
) -> Online | None:
    """The transform and format as the kernel takes them; None where it has no form of them."""
    group = form.group_size if form.granularity == "group" else 0
    scale, shift = (None, None) if transform is None else (transform.inverse_scale, transform.shift)
    rotations = [] if transform is None else transform.rotations
    made = None
    if not rotations:
        b = group or next(b for b in range(min(width, 128), 0, -1) if width % b == 0)
        made = Online(width, width // b, b, None, None, 1.0, 0, 0, scale, shift, form, calibrated)
    elif len(rotations) == 1 and not group:
        start, stop, rotation = rotations[0]
        steps, block = rotation.steps, rotation.steps[0]
        if isinstance(block, BlockStep):
            first, size = _matrix(block)
            b = len(first)
            if len(steps) == 1 and not (start % b or stop % b or width % b):
                made = Online(
                    width, width // b, b, first, None, size, start // b, stop // b, scale, shift, form, calibrated
                )
            elif (start, stop) == (0, width) and _is_full(rotation):
                assert isinstance(steps[2], BlockStep)
                second, other = _matrix(steps[2])
                if second.dtype == first.dtype:
                    a = len(second)
                    made = Online(width, a, b, first, second, size * other, 0, a, scale, shift, form, calibrated)
    if made is None:
        return None
    widest = _WIDEST if made.second is None else _WIDEST_FULL
    return made if triton.next_power_of_2(made.a) * triton.next_power_of_2(made.b) <= widest else None


def _is_full(rotation: Rotation) -> bool:
    """Whether it is block step, stride, block step, with a b channels."""
    steps = rotation.steps
    if len(steps) != 3 or not isinstance(steps[1], PermuteStep) or not isinstance(steps[2], BlockStep):
        return False
    assert isinstance(steps[0], BlockStep)
    shape = (len(steps[2].matrix), len(steps[0].matrix))
    return steps[1].stride == shape and shape[0] * shape[1] == rotation.size


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":  # tanh(t) = 1 - 2 / (1 + e^2t)
        t = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        z = z * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * t)))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _rotated(z, matrix, SIGNS: tl.constexpr, PARTS: tl.constexpr):
    """z [a, b] times matrix [b, b], float32."""
    if SIGNS:
        high = z.to(tl.bfloat16)
        product = tl.dot(high, matrix)
        if PARTS == 2:
            product = tl.dot((z - high.to(tl.float32)).to(tl.bfloat16), matrix, product)
    else:
        product = tl.dot(z, matrix, input_precision="tf32x3")
    return product


@triton.jit
def _nearest(x):
    """x to the next whole number, half to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_kernel(
    x, gamma, beta, inverse_scale, shift, first, second, calibrated, q, scales, kept,
    size, epsilon, divisor, offset, maximum, tokens_a_sample,
    n: tl.constexpr, a: tl.constexpr, b: tl.constexpr, A: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr,
    GAMMA: tl.constexpr, BETA: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    STEPS: tl.constexpr, SIGNS: tl.constexpr, PARTS: tl.constexpr, START: tl.constexpr, STOP: tl.constexpr,
    GRID: tl.constexpr, GRANULARITY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One token. A, B: a and b padded to powers of two. GRID '': nothing is quantized, only `kept` is written."""
    token = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, A)[:, None], tl.arange(0, B)[None, :]
    channel = i * b + j
    inside = (i < a) & (j < b)
    z = tl.load(x + token * n + channel, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(z, 1), 0) / n
        z = tl.where(inside, z - mean, 0.0)
        z = z * tl.rsqrt(tl.sum(tl.sum(z * z, 1), 0) / n + epsilon)
    sample = token // tokens_a_sample
    if GAMMA:
        z = z * (1.0 + tl.load(gamma + sample * n + channel, mask=inside, other=0.0).to(tl.float32))
    if BETA:
        z = z + tl.load(beta + sample * n + channel, mask=inside, other=0.0).to(tl.float32)
    z = _activated(z, ACTIVATION)
    if SCALED:
        z = z * tl.load(inverse_scale + channel, mask=inside, other=0.0)
    if SHIFTED:
        z = z - tl.load(shift + channel, mask=inside, other=0.0)
    if STEPS > 0:
        p, r = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
        matrix = tl.load(first + p * b + r, mask=(p < b) & (r < b), other=0.0)
        rotated = _rotated(z, matrix, SIGNS, PARTS)
        if STEPS == 2:
            p, r = tl.arange(0, A)[:, None], tl.arange(0, A)[None, :]
            matrix = tl.load(second + p * a + r, mask=(p < a) & (r < a), other=0.0)
            z = _rotated(rotated.T, matrix, SIGNS, 2) * size
            i, j = tl.arange(0, B)[:, None], tl.arange(0, A)[None, :]
            channel = i * a + j
            inside = (i < b) & (j < a)
        elif START == 0 and STOP == a:
            z = rotated * size
        else:
            z = tl.where((i >= START) & (i < STOP), rotated * size, z)
    if KEEP:
        tl.store(kept + token * n + channel, z.to(kept.dtype.element_ty), mask=inside)
    if GRID != "":
        if GRID == "unsigned":
            z = tl.where(inside, z + offset, 0.0)
            magnitude = tl.where(inside, z, float("-inf"))
        else:
            magnitude = tl.abs(z)
        if GRANULARITY == "token":
            s = tl.maximum(tl.max(tl.max(magnitude, 1), 0) / divisor, _SMALLEST)
        elif GRANULARITY == "group":
            s = tl.maximum(tl.max(magnitude, 1) / divisor, _SMALLEST)
        else:
            s = tl.load(calibrated)
        if GRANULARITY == "group":
            steps = z * (1.0 / s)[:, None]
        else:
            steps = z * (1.0 / s)
        unit = s
        if GRID == "midrise":
            number = 2.0 * _nearest(tl.minimum(tl.maximum(steps - 0.5, -maximum), maximum - 1.0)) + 1.0
            unit = s * 0.5
        elif GRID == "unsigned":
            number = _nearest(tl.minimum(tl.maximum(steps, 0.0), maximum))
        elif GRID == "float8_e4m3":
            number = tl.minimum(tl.maximum(steps, -maximum), maximum)
        else:
            number = _nearest(tl.minimum(tl.maximum(steps, -maximum), maximum))
        tl.store(q + token * n + channel, number.to(q.dtype.element_ty), mask=inside)
        if GRANULARITY == "group":
            row = tl.arange(0, A)
            tl.store(scales + token * a + row, unit, mask=row < a)
        else:
            tl.store(scales + token, unit)


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
    A, B = max(triton.next_power_of_2(plan.a), 16), max(triton.next_power_of_2(plan.b), 16)
    untouched = not (before.norm or before.activation or before.gamma is not None or before.beta is not None)
    exact = x.dtype == torch.bfloat16 and untouched and plan.inverse_scale is None and plan.shift is None
    warps = min(16 if plan.second is None else 4, A * B // 1024)  # of the latter, more warps would spill
    constants = {
        "n": plan.width, "a": plan.a, "b": plan.b, "A": A, "B": B, "NORM": before.norm, "GAMMA": before.gamma is not None,
        "BETA": before.beta is not None, "ACTIVATION": before.activation, "SCALED": plan.inverse_scale is not None,
        "SHIFTED": plan.shift is not None, "STEPS": (plan.first is not None) + (plan.second is not None),
        "SIGNS": plan.first is not None and plan.first.dtype == torch.bfloat16, "PARTS": 1 if exact else 2,
        "START": plan.start, "STOP": plan.stop, "GRID": grid, "GRANULARITY": form.granularity, "KEEP": kept is not None,
        "num_warps": max(1, warps), "num_stages": 1,
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
) -> None:
    """Fill q [M, n] and scales [M], or [M, G] for groups of channels, and `kept` [M, n], the transformed input."""
    values, constants = arguments(x, tokens_a_sample, before, plan, q, scales, kept)
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
    if before.activation == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if before.activation == "gelu_tanh" else "none") if before.activation else z


def quantize_meaning(
    x: Tensor, tokens_a_sample: int, before: Before, transform: InputTransform | None, form: ActivationFormat = FLOAT,
    calibrated: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(x' [M, n], what is rounded: x' in steps of its grid, and s) in float64; no steps and s for inputs in floating point."""
    z = before_meaning(x, tokens_a_sample, before)
    z = z if transform is None else transform(z)
    if form.granularity == "none":
        return z, None, None
    scale = form.scale_of(z, calibrated)
    return z, form.steps(z, scale), scale
