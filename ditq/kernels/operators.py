"""The kernels as operators of torch, so that torch.compile sees each as one node and never looks inside.

They launch Triton kernels and nothing else: without a GPU, or Triton's interpreter in the tests, they raise an error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from ditq.kernels import quantize
from ditq.kernels.matmul import Product
from ditq.kernels.online import Online
from ditq.kernels.product import computed
from ditq.kernels.quantize import Before, number_type
from ditq.kernels.storage import StoredWeight
from ditq.numerics.activation_format import ActivationFormat


def _form(bits: int, granularity: str, grid: str, group: int) -> ActivationFormat:
    """Without clip and shift, which `limits` holds."""
    return ActivationFormat(bits, granularity, grid, group_size=group)  # type: ignore[arg-type]


@custom_op("ditq::quantized", mutates_args=())
def quantized(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    inverse_scale: Tensor | None,
    shift: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    calibrated: Tensor | None,
    norm: bool,
    epsilon: float,
    activation: str,
    a: int,
    b: int,
    size: float,
    start: int,
    stop: int,
    bits: int,
    granularity: str,
    grid: str,
    limits: Tensor | None,
    group: int,
    keep: bool,
    tail: Tensor | None = None,
    times: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., n] -> (q [M, n], scales [M] or [M, G], the transformed input [M, n] in x's dtype where it is kept, else [0]).

    The last of the n channels may be those of `tail` [..., m]; an activation is of these alone then. With `times`, x is of FP8
    numbers, to be multiplied by it.
    """
    form = _form(bits, granularity, grid, group)
    width = a * b
    pieces = [None if piece is None else piece.reshape(-1, width) for piece in (gamma, beta)]
    samples = max((len(piece) for piece in pieces if piece is not None), default=1)
    # One for all samples, beside another that each has of its own, is read by sample as well.
    pieces = [None if piece is None else piece.expand(samples, -1).contiguous() for piece in pieces]
    q, scales, kept = _made(x, tail, a, b, form, keep)
    plan = Online(width, a, b, first, second, size, start, stop, inverse_scale, shift, form, calibrated, limits)
    if len(q):
        before = Before(norm, pieces[0], pieces[1], activation, epsilon, times)
        quantize.launch(x, len(q) // samples, before, plan, q, scales, kept if keep else None, tail=tail)
    return q, scales, kept


def _made(
    x: Tensor, tail: Tensor | None, a: int, b: int, form: ActivationFormat, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = a * b
    tokens = x.numel() // x.shape[-1]
    groups = (a,) if form.granularity == "group" else ()
    q = x.new_empty((tokens, width), dtype=number_type(form))
    scales = x.new_empty((tokens, *groups), dtype=torch.float32)
    return q, scales, x.new_empty((tokens, width) if keep else (0,))


@quantized.register_fake
def _(
    x, gamma, beta, inverse_scale, shift, first, second, calibrated, norm, epsilon, activation, a, b, size, start, stop, bits,
    granularity, grid, limits, group, keep, tail=None, times=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    return _made(x, tail, a, b, _form(bits, granularity, grid, group), keep)


@custom_op("ditq::product", mutates_args=())
def product(
    x: Tensor,
    x_scale: Tensor | None,
    data: Tensor,
    tables: Tensor | None,
    multiplier: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    rows: int,
    columns: int,
    bits: int,
    run: int,
    group: int,
    float8: bool,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, N] of x [M, K]: quantized with its scales, or bfloat16; with the activation that follows, if one does."""
    stored = StoredWeight(rows, columns, bits, run, data, tables, multiplier, scale, group, float8)
    added = None if added is None else added.contiguous()
    return computed(Product(x.contiguous(), x_scale, stored, bias, added, activation=activation), dtype)


@product.register_fake
def _(
    x, x_scale, data, tables, multiplier, scale, bias, added, rows, columns, bits, run, group, float8, activation, dtype
):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], rows), dtype=dtype)


@custom_op("ditq::experts_product", mutates_args=())
def experts_product(
    x: Tensor,
    x_scale: Tensor | None,
    data: Tensor,
    tables: Tensor | None,
    multiplier: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    chosen: Tensor,
    experts: int,
    rows: int,
    columns: int,
    bits: int,
    run: int,
    group: int,
    float8: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y [samples E C, N] of the rows `chosen` [samples E, C] of x [M, K], by weights of E experts in one [rows = E N, K]."""
    stored = StoredWeight(rows, columns, bits, run, data, tables, multiplier, scale, group, float8)
    product = Product(x.contiguous(), x_scale, stored, bias, chosen=chosen.contiguous(), experts=experts)
    return computed(product, dtype)


@experts_product.register_fake
def _(
    x, x_scale, data, tables, multiplier, scale, bias, chosen, experts, rows, columns, bits, run, group, float8, dtype
):  # type: ignore[no-untyped-def]
    return x.new_empty((chosen.numel(), rows // experts), dtype=dtype)
