"""The product of inputs and weights of 8 bits whose tiles the tensor memory accelerator brings (Hopper and later).

    y = activation((x w^T) s_x s_w + bias + added)      x [M, K] and w [N, K] int8 or FP8, scales a token and a row

A tile that one instruction brings takes no registers and no threads for addresses, so that two programs fit on a
multiprocessor, and the one multiplies while the other scales and stores. The meaning is `matmul_meaning`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ditq.kernels.activation import activated
from ditq.kernels.matmul import Product, Tile
from ditq.numerics.carrier import E4M3

_SHARED = 16 << 20  # bytes of inputs whose tiles run side by side, so that the L2 cache holds them


@triton.jit
def tma_matmul_kernel(
    x, w, x_scale, scale, bias, added, y, M, N, K, neighbours,
    INTEGER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr, TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile [TOKENS, OUTPUTS] of y [M, N]. x, w: descriptors of blocks [TOKENS, STEP] and [OUTPUTS, STEP]; neighbours:
    rows of tiles that run side by side."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(M, TOKENS), tl.cdiv(N, OUTPUTS)
    first = pid // (neighbours * across) * neighbours
    size = tl.minimum(down - first, neighbours)
    i, j = first + pid % (neighbours * across) % size, pid % (neighbours * across) // size
    exact: tl.constexpr = tl.int32 if INTEGER else tl.float32
    acc = tl.zeros((TOKENS, OUTPUTS), exact)
    for k in range(0, tl.cdiv(K, STEP)):
        a = x.load([i * TOKENS, k * STEP])
        b = w.load([j * OUTPUTS, k * STEP])
        acc = tl.dot(
            a, b.T, acc, out_dtype=exact
        )  # Hopper adds FP8 products in 22 bits, as the vendor's fast product does
    token, column = i * TOKENS + tl.arange(0, TOKENS), j * OUTPUTS + tl.arange(0, OUTPUTS)
    here, there = token < M, column < N
    s = (
        tl.load(x_scale + token, mask=here, other=0.0)[:, None]
        * tl.load(scale + column, mask=there, other=0.0)[None, :]
    )
    result = acc.to(tl.float32) * s
    if HAS_BIAS:
        result += tl.load(bias + column, mask=there, other=0.0)[None, :]
    where, inside = token.to(tl.int64)[:, None] * N + column[None, :], here[:, None] & there[None, :]
    if HAS_ADDED:
        result += tl.load(added + where, mask=inside, other=0.0).to(tl.float32)
    result = activated(result, ACTIVATION)
    tl.store(y + where, result.to(y.dtype.element_ty), mask=inside)


def arguments(product: Product, y: Tensor, tile: Tile) -> tuple[list[Any], dict[str, object]]:
    """(what the kernel takes, what it is compiled for)."""
    x, stored = product.x, product.stored
    data = stored.data if x.dtype == torch.int8 else stored.data.view(E4M3)
    values = [
        TensorDescriptor.from_tensor(x, [tile.tokens, tile.step]),
        TensorDescriptor.from_tensor(data, [tile.outputs, tile.step]),
        product.x_scale, stored.scale, stored.scale if product.bias is None else product.bias,
        y if product.added is None else product.added, y, len(x), stored.rows, stored.columns,
        max(1, _SHARED // (tile.tokens * stored.columns)),
    ]  # fmt: skip
    constants = {
        "INTEGER": x.dtype == torch.int8, "HAS_BIAS": product.bias is not None, "HAS_ADDED": product.added is not None,
        "ACTIVATION": product.activation, "TOKENS": tile.tokens, "OUTPUTS": tile.outputs, "STEP": tile.step,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return values, constants


def launch(product: Product, y: Tensor, tile: Tile) -> None:
    """Fill y [M, N]. For a plain product with a scale a token and a row, of a weight in 8 bits and K a multiple of 16."""
    values, constants = arguments(product, y, tile)
    grid = (triton.cdiv(len(product.x), tile.tokens) * triton.cdiv(product.stored.rows, tile.outputs),)
    tma_matmul_kernel[grid](*values, **constants)
