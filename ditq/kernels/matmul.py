"""The product of quantized or bfloat16 inputs with a stored weight: decoded on the way to the tensor cores, scaled at the end.

    y = (x w^T) s_x s_w + bias      x and w int8 or FP8, x [M, K] with scales s_x a token, or a token and group of channels
    y = x (w s_w)^T + bias          x bfloat16 [M, K]; scales a row, or a row and group of columns

One kernel: what differs is known when it is compiled. `matmul_meaning` is the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels.decoding import decode_nibbles, decode_planes, factor, table_words
from ditq.kernels.storage import StoredWeight, carrier_meaning, runs_a_span, weight_meaning


@dataclass(frozen=True)
class Tile:
    """How the kernel is laid out: tokens and outputs a program; whether the weight stands first in the product, so that its
    registers feed the tensor cores of Hopper and Blackwell directly; warps, stages; columns a step for weights of 8 bits."""

    tokens: int
    outputs: int
    weight_first: bool = False
    warps: int = 4
    stages: int = 3
    step: int = 64


@triton.jit
def _add_run(
    acc, w, x, x_scale, scale, token, row, column, K,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    CARRIER8: tl.constexpr, W_GROUP: tl.constexpr, W_GROUPS: tl.constexpr, X_GROUP: tl.constexpr, X_GROUPS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, M, N,
):  # fmt: skip
    """acc + x[:, column : column + RUN] w^T for the decoded carriers w [OUTPUTS, RUN] of one run."""
    k = column + tl.arange(0, RUN)
    inside = (token < M)[:, None] if EVEN else (token < M)[:, None] & (k < K)[None, :]
    part = tl.load(x + token.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
    if CARRIER8 and w.dtype == tl.int8:
        w = w.to(tl.float8e4nv, bitcast=True)
    if KIND == "float":
        if W_GROUP > 0:
            group = column // W_GROUP
            s = tl.load(
                scale + row.to(tl.int64) * W_GROUPS + group, mask=(row < N) & (row * 0 + group < W_GROUPS), other=0.0
            )
            w = (w.to(tl.float32) * s[:, None]).to(tl.bfloat16)
        else:
            w = w.to(tl.float32).to(tl.bfloat16)  # exact: a carrier has at most 8 bits
    INTEGER: tl.constexpr = KIND == "int8"
    exact: tl.constexpr = tl.int32 if INTEGER else tl.float32
    if WEIGHT_FIRST:
        left, right = w, part.T
    else:
        left, right = part, w.T
    if X_GROUP > 0:
        product = tl.dot(left, right, out_dtype=exact).to(tl.float32)
        group = column // X_GROUP
        inside = (token < M) & (token * 0 + group < X_GROUPS)
        s = tl.load(x_scale + token.to(tl.int64) * X_GROUPS + group, mask=inside, other=0.0)
        if WEIGHT_FIRST:
            acc += product * s[None, :]
        else:
            acc += product * s[:, None]
    elif KIND == "float8":  # Hopper adds FP8 products in fewer bits unless told how many it may
        acc = tl.dot(left, right, acc, out_dtype=exact, max_num_imprecise_acc=RUN)
    else:
        acc = tl.dot(left, right, acc, out_dtype=exact)
    return acc


@triton.jit
def matmul_kernel(
    x, x_scale, data, tables, multiplier, scale, bias, added, y, M, N, K,
    BITS: tl.constexpr, RUN: tl.constexpr, KIND: tl.constexpr, CARRIER8: tl.constexpr, OWN: tl.constexpr,
    MULTIPLIED: tl.constexpr, M_GROUP: tl.constexpr, M_GROUPS: tl.constexpr, W_GROUP: tl.constexpr, W_GROUPS: tl.constexpr,
    X_GROUP: tl.constexpr, X_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile [TOKENS, OUTPUTS] of y [M, N]. KIND: int8, float8 or float inputs; *_GROUP: columns a group, or 0."""
    pid = tl.program_id(0)
    across = tl.cdiv(M, TOKENS)
    token = (pid % across) * TOKENS + tl.arange(0, TOKENS)  # neighbours share the weight, which is then in the L2 cache
    row = (pid // across) * OUTPUTS + tl.arange(0, OUTPUTS)
    SPAN: tl.constexpr = RUN * (1 if BITS == 8 else (2 if BITS == 4 else 8))
    exact: tl.constexpr = tl.int32 if (KIND == "int8" and X_GROUP == 0) else tl.float32
    acc = tl.zeros((OUTPUTS, TOKENS) if WEIGHT_FIRST else (TOKENS, OUTPUTS), exact)
    spans = tl.cdiv(K, SPAN)
    row64, inside = row.to(tl.int64)[:, None], (row < N)[:, None]
    byte = tl.arange(0, RUN)[None, :]
    if BITS < 8:
        w0, w1, w2, w3 = table_words(tables, row64, inside, BITS, OWN)
    for span in range(0, spans):
        first = span * SPAN
        if BITS == 8:
            k = first + byte
            w = tl.load(data + row64 * K + k, mask=inside if EVEN else inside & (k < K), other=0)
            acc = _add_run(acc, w, x, x_scale, scale, token, row, first, K, TOKENS, OUTPUTS, RUN, EVEN, KIND, CARRIER8,
                           W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, M, N)  # fmt: skip
        elif BITS == 4:
            codes = tl.load(data + row64 * (spans * RUN) + (span * RUN + byte), mask=inside, other=0)
            low, high = 0, 0
            if MULTIPLIED:
                low = factor(multiplier, row64, inside, first // M_GROUP, M_GROUPS)
                high = factor(multiplier, row64, inside, (first + RUN) // M_GROUP, M_GROUPS)
            a, b = decode_nibbles(codes, w0, w1, w2, w3, low, high, OWN, MULTIPLIED)
            acc = _add_run(acc, a, x, x_scale, scale, token, row, first, K, TOKENS, OUTPUTS, RUN, EVEN, KIND, CARRIER8,
                           W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, M, N)  # fmt: skip
            acc = _add_run(acc, b, x, x_scale, scale, token, row, first + RUN, K, TOKENS, OUTPUTS, RUN, EVEN, KIND,
                           CARRIER8, W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, M, N)  # fmt: skip
        else:
            place = data + row64 * (spans * RUN) + (span * RUN + byte)
            plane = tl.cast(N, tl.int64) * (spans * RUN)
            p0 = tl.load(place, mask=inside, other=0)
            p1 = tl.load(place + plane, mask=inside, other=0)
            p2 = tl.load(place + (BITS - 1) * plane, mask=inside, other=0)
            for pair in tl.static_range(4):
                low, high = 0, 0
                if MULTIPLIED:
                    low = factor(multiplier, row64, inside, (first + pair * RUN) // M_GROUP, M_GROUPS)
                    high = factor(multiplier, row64, inside, (first + (pair + 4) * RUN) // M_GROUP, M_GROUPS)
                a, b = decode_planes(p0, p1, p2, w0, w1, low, high, pair, BITS, OWN, MULTIPLIED)
                acc = _add_run(acc, a, x, x_scale, scale, token, row, first + pair * RUN, K, TOKENS, OUTPUTS, RUN, EVEN,
                               KIND, CARRIER8, W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, M, N)  # fmt: skip
                acc = _add_run(acc, b, x, x_scale, scale, token, row, first + (pair + 4) * RUN, K, TOKENS, OUTPUTS, RUN,
                               EVEN, KIND, CARRIER8, W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, M, N)  # fmt: skip
    result = acc.T.to(tl.float32) if WEIGHT_FIRST else acc.to(tl.float32)
    if W_GROUP == 0:
        result = result * tl.load(scale + row, mask=row < N, other=0.0)[None, :]
    if KIND != "float" and X_GROUP == 0:
        result = result * tl.load(x_scale + token, mask=token < M, other=0.0)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < N, other=0.0)[None, :]
    place = token.to(tl.int64)[:, None] * N + row[None, :]
    inside = (token < M)[:, None] & (row < N)[None, :]
    if HAS_ADDED:
        result += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


def arguments(
    x: Tensor,
    x_scale: Tensor | None,
    stored: StoredWeight,
    bias: Tensor | None,
    added: Tensor | None,
    y: Tensor,
    tile: Tile,
) -> tuple[list[Tensor | int], dict[str, object]]:
    """(what the kernel takes, what it is compiled for) for inputs x [M, K] and outputs y [M, N]."""
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "float8", torch.bfloat16: "float"}[x.dtype]
    tokens, columns = x.shape
    x_groups = 1 if x_scale is None or x_scale.dim() == 1 else x_scale.shape[1]
    multiplied = stored.multiplier is not None
    groups = columns // stored.group if stored.group else 1
    run = tile.step if stored.bits == 8 and not stored.group % tile.step and x_groups == 1 else stored.run
    span = run * runs_a_span(stored.bits)
    data = stored.data.view(torch.int8) if stored.bits == 8 else stored.data
    filled = [x, x if x_scale is None else x_scale, data, x if stored.tables is None else stored.tables]
    filled += [stored.data if stored.multiplier is None else stored.multiplier, stored.scale]
    filled += [stored.scale if bias is None else bias, y if added is None else added, y]
    constants = {
        "BITS": stored.bits, "RUN": run, "KIND": kind, "CARRIER8": stored.float8,
        "OWN": stored.tables is not None and stored.tables.dim() == 2, "MULTIPLIED": multiplied,
        "M_GROUP": stored.group if multiplied else 0, "M_GROUPS": groups if multiplied else 1,
        "W_GROUP": stored.group if stored.scale.dim() == 2 else 0, "W_GROUPS": groups if stored.scale.dim() == 2 else 1,
        "X_GROUP": columns // x_groups if x_groups > 1 else 0, "X_GROUPS": x_groups,
        "HAS_BIAS": bias is not None, "HAS_ADDED": added is not None, "EVEN": columns % span == 0,
        "TOKENS": tile.tokens, "OUTPUTS": tile.outputs, "WEIGHT_FIRST": tile.weight_first,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return [*filled, tokens, stored.rows, columns], constants


def launch(
    x: Tensor,
    x_scale: Tensor | None,
    stored: StoredWeight,
    bias: Tensor | None,
    added: Tensor | None,
    y: Tensor,
    tile: Tile,
) -> None:
    """Fill y [M, N] with the product, by one kernel."""
    values, constants = arguments(x, x_scale, stored, bias, added, y, tile)
    grid = (triton.cdiv(x.shape[0], tile.tokens) * triton.cdiv(stored.rows, tile.outputs),)
    matmul_kernel[grid](*values, **constants)


def matmul_meaning(
    x: Tensor, x_scale: Tensor | None, stored: StoredWeight, bias: Tensor | None, added: Tensor | None = None
) -> Tensor:
    """The product float64 [M, N] in plain torch."""
    if x_scale is None:
        y = F.linear(x.double(), weight_meaning(stored).double())
    else:
        scales = x_scale if x_scale.dim() == 2 else x_scale[:, None]
        values = (x.double().unflatten(1, (scales.shape[1], -1)) * scales.double()[:, :, None]).flatten(1)
        y = F.linear(values, carrier_meaning(stored).double()) * stored.scale.double()
    y = y if bias is None else y + bias.double()
    return y if added is None else y + added.double()
