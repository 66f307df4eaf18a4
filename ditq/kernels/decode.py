"""A stored weight written out in full, for products of so many tokens that decoding it anew in each tile would cost more.

The full weight lies in scratch memory that all layers share, while the stored one stays as it is: for 3072 x 12288 at 4 bits
that is 38 MB once, not a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditq.kernels.decoding import decode_nibbles, decode_planes, factor, table_words
from ditq.kernels.storage import StoredWeight, runs_a_span
from ditq.numerics.carrier import E4M3

_ROWS = 64  # that one program writes


@triton.jit
def _write(
    out, w, scale, row, there, column, K, RUN: tl.constexpr, CARRIER8: tl.constexpr, SCALED: tl.constexpr,
    W_GROUP: tl.constexpr, W_GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the carriers int8 [R, RUN] of one run, or the weights that they make with their scales."""
    k = column + tl.arange(0, RUN)[None, :]
    if SCALED:
        number = (w.to(tl.float8e4nv, bitcast=True) if CARRIER8 else w).to(tl.float32)
        if W_GROUP > 0:
            group = column // W_GROUP
            s = tl.load(scale + row * W_GROUPS + group, mask=there & (row * 0 + group < W_GROUPS), other=0.0)
        else:
            s = tl.load(scale + row, mask=there, other=0.0)
        w = (number * s).to(tl.bfloat16)
    tl.store(out + row * K + k, w, mask=there & (k < K))


@triton.jit
def decode_kernel(
    data, tables, multiplier, scale, out, N, K, rows_a_table,
    BITS: tl.constexpr, RUN: tl.constexpr, CARRIER8: tl.constexpr, OWN: tl.constexpr, MULTIPLIED: tl.constexpr,
    M_GROUP: tl.constexpr, M_GROUPS: tl.constexpr, SCALED: tl.constexpr, W_GROUP: tl.constexpr, W_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One span of ROWS rows of one table. out: int8 carriers [N, K], or with SCALED the weight in bfloat16."""
    SPAN: tl.constexpr = RUN * (1 if BITS == 8 else (2 if BITS == 4 else 8))
    spans = tl.cdiv(K, SPAN)
    span, part, parts = tl.program_id(0) % spans, tl.program_id(0) // spans, tl.cdiv(rows_a_table, ROWS)
    table, local = part // parts, ((part % parts) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    row, inside = table * rows_a_table + local, local < rows_a_table
    first, byte = span * SPAN, tl.arange(0, RUN)[None, :]
    if BITS == 8:
        w = tl.load(data + row * K + first + byte, mask=inside & (first + byte < K), other=0)
        _write(out, w, scale, row, inside, first, K, RUN, CARRIER8, SCALED, W_GROUP, W_GROUPS)
    else:
        w0, w1, w2, w3 = table_words(tables, table, row, inside, BITS, OWN)
        place = data + row * (spans * RUN) + (span * RUN + byte)
        if BITS == 4:
            codes = tl.load(place, mask=inside, other=0)
            low, high = 0, 0
            if MULTIPLIED:
                low = factor(multiplier, row, inside, first // M_GROUP, M_GROUPS)
                high = factor(multiplier, row, inside, (first + RUN) // M_GROUP, M_GROUPS)
            v, w = decode_nibbles(codes, w0, w1, w2, w3, low, high, OWN, MULTIPLIED)
            _write(out, v, scale, row, inside, first, K, RUN, CARRIER8, SCALED, W_GROUP, W_GROUPS)
            _write(out, w, scale, row, inside, first + RUN, K, RUN, CARRIER8, SCALED, W_GROUP, W_GROUPS)
        else:
            plane = tl.cast(N, tl.int64) * (spans * RUN)
            p0 = tl.load(place, mask=inside, other=0)
            p1 = tl.load(place + plane, mask=inside, other=0)
            p2 = tl.load(place + (BITS - 1) * plane, mask=inside, other=0)
            for pair in tl.static_range(4):
                low, high = 0, 0
                if MULTIPLIED:
                    low = factor(multiplier, row, inside, (first + pair * RUN) // M_GROUP, M_GROUPS)
                    high = factor(multiplier, row, inside, (first + (pair + 4) * RUN) // M_GROUP, M_GROUPS)
                v, w = decode_planes(p0, p1, p2, w0, w1, low, high, pair, BITS, OWN, MULTIPLIED)
                _write(out, v, scale, row, inside, first + pair * RUN, K, RUN, CARRIER8, SCALED, W_GROUP, W_GROUPS)
                _write(
                    out, w, scale, row, inside, first + (pair + 4) * RUN, K, RUN, CARRIER8, SCALED, W_GROUP, W_GROUPS
                )


def arguments(stored: StoredWeight, out: Tensor) -> tuple[list[Tensor | int], dict[str, object]]:
    """(what the kernel takes, what it is compiled for); out [N, K] int8 for carriers, bfloat16 for the weight."""
    groups = stored.columns // stored.group if stored.group else 1
    multiplied, by_group = stored.multiplier is not None, stored.scale.dim() == 2
    data = stored.data.view(torch.int8) if stored.bits == 8 else stored.data
    tables = stored.scale if stored.tables is None else stored.tables
    multiplier = stored.data if stored.multiplier is None else stored.multiplier
    constants: dict[str, object] = {
        "BITS": stored.bits, "RUN": stored.run, "CARRIER8": stored.float8,
        "OWN": stored.table_a_row, "MULTIPLIED": multiplied,
        "M_GROUP": stored.group if multiplied else 0, "M_GROUPS": groups if multiplied else 1,
        "SCALED": out.dtype == torch.bfloat16, "W_GROUP": stored.group if by_group else 0,
        "W_GROUPS": groups if by_group else 1, "ROWS": _ROWS, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    of_table = stored.rows if stored.table_a_row else stored.rows_a_table
    return [data, tables, multiplier, stored.scale, out, stored.rows, stored.columns, of_table], constants


def decode_into(stored: StoredWeight, out: Tensor) -> None:
    """Fill out [N, K]: int8 or FP8 with the carriers, bfloat16 with the weight."""
    out = out.view(torch.int8) if out.dtype == E4M3 else out
    values, constants = arguments(stored, out)
    spans = triton.cdiv(stored.columns, stored.run * runs_a_span(stored.bits))
    of_table = stored.rows if stored.table_a_row else stored.rows_a_table
    parts = stored.rows // of_table * triton.cdiv(of_table, _ROWS)
    decode_kernel[(spans * parts,)](*values, **constants)
