"""The product of a stored weight and few tokens, as a modulation has them: only the weight's bytes are waited for.

    y = activation(x (w s_w)^T + bias + added)      x bfloat16 [M, K], scales of w a row, or a row and group of columns

A program reads a few rows of the weight in long pieces and adds up what they make with one token in float32. A tile of the
tensor cores would be filled with zeros for the tokens that are not there, and wait once for each of its short steps. The
meaning is `matmul_meaning`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditq.kernels.activation import activated
from ditq.kernels.decoding import decode_nibbles, table_words
from ditq.kernels.matmul import Product, Tile
from ditq.kernels.storage import PLANE_RUN, RUN

FEW = 8  # tokens up to which it may pay
TILES = [Tile(1, 8, step=512), Tile(1, 4, warps=2, step=512), Tile(1, 16, step=512)]


@triton.jit
def _carrier(w, CARRIER8: tl.constexpr):
    return (w.to(tl.float8e4nv, bitcast=True) if CARRIER8 else w).to(tl.float32)


@triton.jit
def _of_groups(
    product, scale, row, there, first, apart: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
    W_GROUP: tl.constexpr, W_GROUPS: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS] of products [ROWS, RUNS * RUN], each run times the scale of its group; runs begin `apart` columns apart."""
    if W_GROUP == 0:
        return tl.sum(product, 1)
    each = tl.sum(tl.reshape(product, (ROWS, RUNS, RUN)), 2)
    group = (first + tl.arange(0, RUNS) * apart)[None, :] // W_GROUP
    s = tl.load(
        scale + row.to(tl.int64)[:, None] * W_GROUPS + group, mask=there[:, None] & (group < W_GROUPS), other=0.0
    )
    return tl.sum(each * s, 1)


@triton.jit
def vector_kernel(
    x, data, tables, scale, bias, added, y, N, K,
    BITS: tl.constexpr, RUN: tl.constexpr, CARRIER8: tl.constexpr, OWN: tl.constexpr, W_GROUP: tl.constexpr,
    W_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token; STEP bytes of each row of the weight at a time. BITS: 4 or 8."""
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, row64 = row < N, row.to(tl.int64)[:, None]
    inside = there[:, None]
    SHARE: tl.constexpr = 8 // BITS  # codes of a byte, which belong to runs next to each other
    RUNS: tl.constexpr = STEP // RUN
    length = tl.cdiv(K, SHARE * RUN) * RUN if BITS == 4 else K
    if BITS == 4:
        w0, w1, w2, w3 = table_words(tables, 0, row64, inside, BITS, OWN)
    acc = tl.zeros((ROWS,), tl.float32)
    for first in range(0, length, STEP):
        byte = first + tl.arange(0, STEP)[None, :]
        codes = tl.load(data + row64 * length + byte, mask=inside & (byte < length), other=0)
        # Each thread reads the channels that its codes meet, from the cache, rather than to pass them on through shared memory.
        column = byte // RUN * (SHARE * RUN) + byte % RUN
        low = tl.load(x + token * K + column + 0 * row64, mask=inside & (column < K), other=0.0).to(tl.float32)
        if BITS == 4:
            column += RUN
            high = tl.load(x + token * K + column + 0 * row64, mask=inside & (column < K), other=0.0).to(tl.float32)
            a, b = decode_nibbles(codes, w0, w1, w2, w3, 0, 0, OWN, False)
            acc += _of_groups(_carrier(a, CARRIER8) * low, scale, row, there, 2 * first, 2 * RUN, ROWS, RUN, RUNS, W_GROUP,
                              W_GROUPS)  # fmt: skip
            acc += _of_groups(_carrier(b, CARRIER8) * high, scale, row, there, 2 * first + RUN, 2 * RUN, ROWS, RUN, RUNS,
                              W_GROUP, W_GROUPS)  # fmt: skip
        else:
            acc += _of_groups(_carrier(codes, CARRIER8) * low, scale, row, there, first, RUN, ROWS, RUN, RUNS, W_GROUP,
                              W_GROUPS)  # fmt: skip
    if W_GROUP == 0:
        acc *= tl.load(scale + row, mask=there, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + row, mask=there, other=0.0)
    if HAS_ADDED:
        acc += tl.load(added + token * N + row, mask=there, other=0.0).to(tl.float32)
    acc = activated(acc, ACTIVATION)
    tl.store(y + token * N + row, acc.to(y.dtype.element_ty), mask=there)


def fits(product: Product) -> bool:
    """Whether the kernel has a form of the product: few tokens in bfloat16, a weight in 4 or 8 bits without multipliers."""
    stored = product.stored
    plain = product.chosen is None and product.x_scale is None and stored.multiplier is None
    one_table = stored.tables is None or stored.table_a_row or stored.rows_a_table == stored.rows
    return plain and one_table and stored.bits in (4, 8) and len(product.x) <= FEW


def arguments(product: Product, y: Tensor, tile: Tile) -> tuple[list[Any], dict[str, object]]:
    """(what the kernel takes, what it is compiled for)."""
    stored, by_group = product.stored, product.stored.scale.dim() == 2
    data = stored.data.view(torch.int8) if stored.bits == 8 else stored.data
    run = stored.run if stored.bits == 4 else PLANE_RUN if by_group and stored.group % RUN else RUN
    values = [
        product.x, data, stored.scale if stored.tables is None else stored.tables, stored.scale,
        stored.scale if product.bias is None else product.bias, y if product.added is None else product.added, y,
        stored.rows, stored.columns,
    ]  # fmt: skip
    constants: dict[str, object] = {
        "BITS": stored.bits, "RUN": run, "CARRIER8": stored.float8, "OWN": stored.table_a_row,
        "W_GROUP": stored.group if by_group else 0, "W_GROUPS": stored.scale.shape[1] if by_group else 1,
        "HAS_BIAS": product.bias is not None, "HAS_ADDED": product.added is not None, "ACTIVATION": product.activation,
        "ROWS": tile.outputs, "STEP": tile.step, "num_warps": tile.warps, "num_stages": 1,
    }  # fmt: skip
    return values, constants


def launch(product: Product, y: Tensor, tile: Tile) -> None:
    """Fill y [M, N]."""
    values, constants = arguments(product, y, tile)
    vector_kernel[(triton.cdiv(product.stored.rows, tile.outputs), len(product.x))](*values, **constants)
