"""The product of quantized or bfloat16 inputs with a stored weight: decoded on the way to the tensor cores, scaled at the end.

    y = (x w^T) s_x s_w + bias      x and w int8 or FP8, x [M, K] with scales s_x a token, or a token and group of channels
    y = x (w s_w)^T + bias          x bfloat16 [M, K]; scales a row, or a row and group of columns

and the activation of it, where one follows.

With experts it is many such products in one launch, each of some rows of x with the weight of one expert; rows are looked
up as they are loaded, so that none is ever copied:

    y[g C + c] = x[chosen[g, c]] w_e^T ...      for each sample and expert g = sample E + e and slot c; 0 where chosen is -1

One kernel: what differs is known when it is compiled. `matmul_meaning` and `experts_meaning` are the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels.activation import activated, activation_meaning
from ditq.kernels.decoding import decode_nibbles, decode_planes, factor, table_words
from ditq.kernels.storage import StoredWeight, carrier_meaning, runs_a_span, weight_meaning


@dataclass(frozen=True)
class Tile:
    """How the kernel is laid out: tokens and outputs a program; whether the weight stands first in the product, so that its
    registers feed the tensor cores of Hopper and Blackwell directly; warps, stages; columns a step for weights of 8 bits;
    whether the tensor memory accelerator brings the tiles (tma_matmul.py)."""

    tokens: int
    outputs: int
    weight_first: bool = False
    warps: int = 4
    stages: int = 3
    step: int = 64
    brought: bool = False


@triton.jit
def _add_run(
    acc, w, x, x_scale, scale, token, here, row, there, column, K,
    RUN: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
    CARRIER8: tl.constexpr, W_GROUP: tl.constexpr, W_GROUPS: tl.constexpr, X_GROUP: tl.constexpr, X_GROUPS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """acc + x[token, column : column + RUN] w^T for the decoded carriers w [OUTPUTS, RUN] of one run of the weight's rows.

    here, there: which tokens and rows there are; with experts each token is one that there is.
    """
    k = column + tl.arange(0, RUN)
    where = x + token.to(tl.int64)[:, None] * K + k[None, :]
    if EXPERTS > 0:
        part = tl.load(where) if EVEN else tl.load(where, mask=(k < K)[None, :], other=0.0)
    else:
        part = tl.load(where, mask=here[:, None] if EVEN else here[:, None] & (k < K)[None, :], other=0.0)
    if CARRIER8 and w.dtype == tl.int8:
        w = w.to(tl.float8e4nv, bitcast=True)
    if KIND == "float":
        if W_GROUP > 0:
            group = column // W_GROUP
            inside = there & (row * 0 + group < W_GROUPS)
            s = tl.load(scale + row.to(tl.int64) * W_GROUPS + group, mask=inside, other=0.0)
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
        inside = here & (token * 0 + group < X_GROUPS)
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
    x, x_scale, chosen, data, tables, multiplier, scale, bias, added, y, M, N, K, samples,
    BITS: tl.constexpr, RUN: tl.constexpr, KIND: tl.constexpr, CARRIER8: tl.constexpr, OWN: tl.constexpr,
    MULTIPLIED: tl.constexpr, M_GROUP: tl.constexpr, M_GROUPS: tl.constexpr, W_GROUP: tl.constexpr, W_GROUPS: tl.constexpr,
    X_GROUP: tl.constexpr, X_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile [TOKENS, OUTPUTS] of y [M, N]. KIND: int8, float8 or float inputs; *_GROUP: columns a group, or 0.

    EXPERTS: how many, or 0 for a plain product; of [M, N] for each sample and expert then.
    """
    pid = tl.program_id(0)
    across, down = tl.cdiv(M, TOKENS), tl.cdiv(N, OUTPUTS)
    slot = (pid % across) * TOKENS + tl.arange(0, TOKENS)  # neighbours share the weight, which is then in the L2 cache
    if EXPERTS > 0:
        rest = pid // across
        expert = rest // samples // down
        column = (rest // samples % down) * OUTPUTS + tl.arange(0, OUTPUTS)
        place = (rest % samples * EXPERTS + expert) * M + slot
        token = tl.load(chosen + place, mask=slot < M, other=-1)
        here, token = token >= 0, tl.maximum(token, 0)  # for a slot that no one uses, any row is as good
        row, rows = expert * N + column, tl.cast(N, tl.int64) * EXPERTS
    else:
        expert = 0
        column = (pid // across) * OUTPUTS + tl.arange(0, OUTPUTS)
        place, token, here = slot, slot, slot < M
        row, rows = column, tl.cast(N, tl.int64)
    there = column < N
    SPAN: tl.constexpr = RUN * (1 if BITS == 8 else (2 if BITS == 4 else 8))
    exact: tl.constexpr = tl.int32 if (KIND == "int8" and X_GROUP == 0) else tl.float32
    acc = tl.zeros((OUTPUTS, TOKENS) if WEIGHT_FIRST else (TOKENS, OUTPUTS), exact)
    spans = tl.cdiv(K, SPAN)
    steps = spans
    if EXPERTS > 0:
        steps = tl.where(tl.max(here.to(tl.int32), 0) > 0, spans, 0)  # nothing is multiplied for slots that no one uses
    row64, inside = row.to(tl.int64)[:, None], there[:, None]
    byte = tl.arange(0, RUN)[None, :]
    if BITS < 8:
        w0, w1, w2, w3 = table_words(tables, expert, row64, inside, BITS, OWN)
    for span in range(0, steps):
        first = span * SPAN
        if BITS == 8:
            k = first + byte
            w = tl.load(data + row64 * K + k, mask=inside if EVEN else inside & (k < K), other=0)
            acc = _add_run(acc, w, x, x_scale, scale, token, here, row, there, first, K, RUN, EVEN, KIND, CARRIER8,
                           W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, EXPERTS)  # fmt: skip
        elif BITS == 4:
            codes = tl.load(data + row64 * (spans * RUN) + (span * RUN + byte), mask=inside, other=0)
            low, high = 0, 0
            if MULTIPLIED:
                low = factor(multiplier, row64, inside, first // M_GROUP, M_GROUPS)
                high = factor(multiplier, row64, inside, (first + RUN) // M_GROUP, M_GROUPS)
            a, b = decode_nibbles(codes, w0, w1, w2, w3, low, high, OWN, MULTIPLIED)
            acc = _add_run(acc, a, x, x_scale, scale, token, here, row, there, first, K, RUN, EVEN, KIND, CARRIER8,
                           W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, EXPERTS)  # fmt: skip
            acc = _add_run(acc, b, x, x_scale, scale, token, here, row, there, first + RUN, K, RUN, EVEN, KIND, CARRIER8,
                           W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, EXPERTS)  # fmt: skip
        else:
            within = data + row64 * (spans * RUN) + (span * RUN + byte)
            plane = rows * (spans * RUN)
            p0 = tl.load(within, mask=inside, other=0)
            p1 = tl.load(within + plane, mask=inside, other=0)
            p2 = tl.load(within + (BITS - 1) * plane, mask=inside, other=0)
            for pair in tl.static_range(4):
                low, high = 0, 0
                if MULTIPLIED:
                    low = factor(multiplier, row64, inside, (first + pair * RUN) // M_GROUP, M_GROUPS)
                    high = factor(multiplier, row64, inside, (first + (pair + 4) * RUN) // M_GROUP, M_GROUPS)
                a, b = decode_planes(p0, p1, p2, w0, w1, low, high, pair, BITS, OWN, MULTIPLIED)
                acc = _add_run(acc, a, x, x_scale, scale, token, here, row, there, first + pair * RUN, K, RUN, EVEN, KIND,
                               CARRIER8, W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, EXPERTS)  # fmt: skip
                acc = _add_run(acc, b, x, x_scale, scale, token, here, row, there, first + (pair + 4) * RUN, K, RUN, EVEN,
                               KIND, CARRIER8, W_GROUP, W_GROUPS, X_GROUP, X_GROUPS, WEIGHT_FIRST, EXPERTS)  # fmt: skip
    result = acc.T.to(tl.float32) if WEIGHT_FIRST else acc.to(tl.float32)
    if W_GROUP == 0:
        result = result * tl.load(scale + row, mask=there, other=0.0)[None, :]
    if KIND != "float" and X_GROUP == 0:
        result = result * tl.load(x_scale + token, mask=here, other=0.0)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=there, other=0.0)[None, :]
    where = place.to(tl.int64)[:, None] * N + column[None, :]
    inside = (slot < M)[:, None] & there[None, :]
    if HAS_ADDED:
        result += tl.load(added + where, mask=inside, other=0.0).to(tl.float32)
    result = activated(result, ACTIVATION)
    if EXPERTS > 0:
        result = tl.where(here[:, None], result, 0.0)
    tl.store(y + where, result.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, eq=False)
class Product:
    """Operands of one product, or with `chosen` of one for each sample and expert.

    x [M, K] int8 or FP8 with x_scale [M] or [M, G], or bfloat16 without; stored: the weight [N, K], or [E N, K] of E experts
    one after the other; bias [N] or [E N]; added [M, N], to plain products only; chosen int32 [samples E, C]: rows of x;
    activation: of what comes out, or ''.
    """

    x: Tensor
    x_scale: Tensor | None
    stored: StoredWeight
    bias: Tensor | None = None
    added: Tensor | None = None
    chosen: Tensor | None = None
    experts: int = 1
    activation: str = ""

    @property
    def size(self) -> tuple[int, int, int]:
        """(how many products, tokens of each, outputs N)."""
        count, tokens = (1, len(self.x)) if self.chosen is None else self.chosen.shape
        return count, tokens, self.stored.rows // self.experts

    @property
    def tokens(self) -> int:
        """That one weight is multiplied with."""
        count, tokens, _ = self.size
        return count * tokens // self.experts


def arguments(product: Product, y: Tensor, tile: Tile) -> tuple[list[Tensor | int], dict[str, object]]:
    """(what the kernel takes, what it is compiled for)."""
    x, x_scale, stored, chosen = product.x, product.x_scale, product.stored, product.chosen
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "float8", torch.bfloat16: "float"}[x.dtype]
    columns = x.shape[1]
    x_groups = 1 if x_scale is None or x_scale.dim() == 1 else x_scale.shape[1]
    multiplied = stored.multiplier is not None
    groups = columns // stored.group if stored.group else 1
    run = tile.step if stored.bits == 8 and not stored.group % tile.step and x_groups == 1 else stored.run
    span = run * runs_a_span(stored.bits)
    data = stored.data.view(torch.int8) if stored.bits == 8 else stored.data
    filled = [x, x if x_scale is None else x_scale, x if chosen is None else chosen, data]
    filled += [x if stored.tables is None else stored.tables]
    filled += [stored.data if stored.multiplier is None else stored.multiplier, stored.scale]
    filled += [stored.scale if product.bias is None else product.bias, y if product.added is None else product.added, y]
    count, tokens, outputs = product.size
    constants = {
        "BITS": stored.bits, "RUN": run, "KIND": kind, "CARRIER8": stored.float8, "OWN": stored.table_a_row,
        "MULTIPLIED": multiplied, "M_GROUP": stored.group if multiplied else 0, "M_GROUPS": groups if multiplied else 1,
        "W_GROUP": stored.group if stored.scale.dim() == 2 else 0, "W_GROUPS": groups if stored.scale.dim() == 2 else 1,
        "X_GROUP": columns // x_groups if x_groups > 1 else 0, "X_GROUPS": x_groups, "HAS_BIAS": product.bias is not None,
        "HAS_ADDED": product.added is not None, "EVEN": columns % span == 0, "ACTIVATION": product.activation,
        "EXPERTS": 0 if chosen is None else product.experts, "TOKENS": tile.tokens, "OUTPUTS": tile.outputs,
        "WEIGHT_FIRST": tile.weight_first, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return [*filled, tokens, outputs, columns, count // product.experts], constants


def launch(product: Product, y: Tensor, tile: Tile) -> None:
    """Fill y [M, N], or [samples E C, N], with the product, by one kernel."""
    values, constants = arguments(product, y, tile)
    count, tokens, outputs = product.size
    grid = (count * triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs),)
    matmul_kernel[grid](*values, **constants)


def matmul_meaning(
    x: Tensor,
    x_scale: Tensor | None,
    stored: StoredWeight,
    bias: Tensor | None,
    added: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """The product float64 [M, N] in plain torch."""
    if x_scale is None:
        y = F.linear(x.double(), weight_meaning(stored).double())
    else:
        y = F.linear(_scaled(x, x_scale), carrier_meaning(stored).double()) * stored.scale.double()
    y = y if bias is None else y + bias.double()
    return activation_meaning(y if added is None else y + added.double(), activation)


def _scaled(x: Tensor, x_scale: Tensor) -> Tensor:
    scales = x_scale if x_scale.dim() == 2 else x_scale[:, None]
    return (x.double().unflatten(1, (scales.shape[1], -1)) * scales.double()[:, :, None]).flatten(1)


def experts_meaning(product: Product) -> Tensor:
    """The products float64 [samples E C, N] in plain torch: row by row, with the weight of the row's expert."""
    assert product.chosen is not None
    if product.x_scale is None:
        values, weights = product.x.double(), weight_meaning(product.stored).double()
    else:
        values = _scaled(product.x, product.x_scale)
        weights = carrier_meaning(product.stored).double() * product.stored.scale.double()[:, None]
    weights = weights.unflatten(0, (product.experts, -1))
    rows = values[product.chosen.clamp_min(0).long()].unflatten(0, (-1, product.experts))  # [samples, E, C, K]
    y = rows @ weights.transpose(1, 2)
    y = y if product.bias is None else y + product.bias.double().view(1, product.experts, 1, -1)
    y = activation_meaning(y, product.activation)
    used = (product.chosen >= 0).view(y.shape[:3])[..., None]
    return torch.where(used, y, 0).flatten(0, 2)
