"""Everything in front of a product in one pass over the tokens: norm, modulation or activation, transform, rounding.

    z  = x                                      what comes in, [M, n]
       | layer_norm(x) (1 + gamma) + beta       gamma, beta [B, n] of each sample's modulation, either may be absent
       | gelu(x), and the like
       | concat(x, tail), concat(x, gelu(tail)) of tensors of their own
    x' = (z inverse_scale - shift) R            numerics: ditq/nn/input_transform.py
    q  = round(x' / s)                          the grids of ditq/numerics/activation_format.py

A program takes one token, as a matrix Z [a, b], in chunks of its rows that all stay in registers (quantizing.py). R is a block
step, Z M_1 with one matrix for the b channels of each row (of the rows of a range), or two with the stride between them,
(Z M_1)^T M_2, a full Hadamard rotation. Matrices of signs are exact in bfloat16, to which z is rounded where x is of it: once;
a model in bfloat16 rounds it after each operation.

`quantize_meaning` is the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels.activation import activation_meaning
from ditq.kernels.online import Cut, Online, cut_of, matrix_of, registers_of
from ditq.kernels.quantizing import chunk, moments, places, read
from ditq.nn.input_transform import InputTransform
from ditq.numerics.activation_format import FLOAT, ActivationFormat
from ditq.numerics.carrier import E4M3
from ditq.numerics.rotation import BlockStep


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
    """
    token = tl.program_id(0).to(tl.int64)
    sample = token // tokens_a_sample
    x += token * x_row
    tail += token * tail_row - OWN * b
    CHUNKS: tl.constexpr = (OWN + ROWS - 1) // ROWS + (a - OWN + ROWS - 1) // ROWS
    z = read(0, x, tail, a, b, ROWS, B, OWN)
    divisor = tl.load(limits) if GRID != "" else 1.0
    offset = tl.load(limits + 1) if GRID == "unsigned" else 0.0
    matrix = 0.0
    if STEPS > 0:
        p, r = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
        matrix = tl.load(first + p * b + r, mask=(p < b) & (r < b), other=0.0)
    factor = size if STEPS == 2 or (STEPS == 1 and a == STOP - START) else 1.0
    pivot, mean, spread = 0.0, 0.0, 1.0
    if NORM:
        pivot = tl.load(x).to(tl.float32)
        if CHUNKS > 1:
            away, squares = tl.zeros((ROWS, B), tl.float32), tl.zeros((ROWS, B), tl.float32)
            for number in tl.static_range(CHUNKS):
                _, _, inside = places(number, a, b, ROWS, B, OWN)
                d = tl.where(inside, read(number, x, tail, a, b, ROWS, B, OWN).to(tl.float32) - pivot, 0.0)
                away += d
                squares += d * d
            mean, spread = moments(away, squares, epsilon, n)
    s = 1.0
    if GRANULARITY == "tensor":
        s = tl.load(calibrated)
    s = chunk(0, z, 0.0, x, tail, times, s, token, sample, pivot, mean, spread, gamma, beta, inverse_scale, shift,
              matrix, second, q, scales, kept, size, factor, epsilon, divisor, offset, n, a, b, ROWS, B, NORM, GAMMA, BETA,
              ACTIVATION, SCALED, SHIFTED, STEPS, SIGNS, HALF, START, STOP, GRID, MAXIMUM, GRANULARITY, KEEP, OWN, TIMES,
              CHUNKS)  # fmt: skip
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


def asread(
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
    capability: int = 0,
) -> tuple[list[Tensor | int | float], dict[str, object]]:
    """(what the kernel takes, what it is compiled for) for tokens x [M, n], or as `as_read` takes them.

    capability: of the GPU, 90 for 9.0.
    """
    form = plan.form
    grid = "" if q is None else form.grid
    x, tail, times = asread(x, tail, plan, before.times)
    given = (
        x, tail, before.gamma, before.beta, plan.inverse_scale, plan.shift, plan.first, plan.second, plan.calibrated,
        plan.limits, q, scales, kept, times,
    )  # fmt: skip
    values: list[Tensor | int | float] = [x if tensor is None else tensor for tensor in given]
    values += [plan.size, before.epsilon, tokens_a_sample]
    values += [x.stride(0), 0 if tail is None else tail.stride(0)]
    cut, B = cut or cut_of(plan), max(triton.next_power_of_2(plan.b), 16)
    half, own = x.dtype in (torch.bfloat16, E4M3), plan.a if tail is None else x.shape[1] // plan.b
    chunks = triton.cdiv(own, cut.rows) + triton.cdiv(plan.a - own, cut.rows)
    constants = {
        "n": plan.width, "a": plan.a, "b": plan.b, "ROWS": cut.rows, "B": B, "NORM": before.norm,
        "GAMMA": before.gamma is not None,
        "BETA": before.beta is not None, "ACTIVATION": before.activation, "SCALED": plan.inverse_scale is not None,
        "SHIFTED": plan.shift is not None, "STEPS": (plan.first is not None) + (plan.second is not None),
        "SIGNS": plan.first is not None and plan.first.dtype == torch.bfloat16, "HALF": half,
        "START": plan.start, "STOP": plan.stop, "GRID": grid, "MAXIMUM": float(form.maximum if grid else 1),
        "GRANULARITY": form.granularity, "KEEP": kept is not None,
        "OWN": own, "TIMES": times is not None, "num_warps": cut.warps,
    }  # fmt: skip
    if half and (registers := registers_of(chunks, capability)) is not None:
        constants["maxnreg"] = registers
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
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    values, constants = arguments(x, tokens_a_sample, before, plan, q, scales, kept, cut, tail, 10 * major + minor)
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
