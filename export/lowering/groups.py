"""A linear whose input has a scale for each run of channels, in ONNX: one integer product a run, summed in float.

    y = sum_g s_g (q_g c_g^T) s_w

A kernel takes one scale for all of its input, so each run is a product of its own in the form of `lowering/activations.py`.
The rows of a branch that reads integers join those of the codes here: that is one copy of the sum, where products of their
own would be as many again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ditq.export.lowering import low_rank, weights
from ditq.export.lowering.writer import Writer
from ditq.nn import QuantLinear

Group = tuple[ir.Value, ir.Value]
"""(integers of a run of channels as the output of a DequantizeLinear, what one of them stands for [..., 1])."""


@dataclass(frozen=True, eq=False)
class Summed:
    """total [..., O]: the product with the codes; inner [..., r]: with the rows of a branch; products: of each group."""

    total: ir.Value
    inner: ir.Value | None
    products: Sequence[ir.Value]


def summed_products(writer: Writer, groups: Sequence[Group], layer: QuantLinear) -> Summed:
    """All that the layer's integers make of an input of these groups, without the bias."""
    products = [
        writer.op("MatMul", integers, weight, name="matmul")
        for (integers, _), weight in zip(groups, _weights(writer, layer, len(groups)), strict=True)
    ]
    scaled = [
        writer.op("Mul", product, scale, name="rescaled") for product, (_, scale) in zip(products, groups, strict=True)
    ]
    total = writer.op("Sum", *scaled, name="summed")
    if not low_rank.reads_integers(layer):
        return Summed(total, None, products)
    widths = writer.constant([layer.out_features, layer.rank], np.int64, name="widths")
    y, inner = writer.ops("Split", 2, total, widths, name="summed.part", axis=-1)
    return Summed(y, inner, products)


def _weights(writer: Writer, layer: QuantLinear, count: int) -> list[ir.Value]:
    """W^T, and A^T beside it, by `count` groups of its rows, [I / count, O + r] each."""
    carrier, scale = weights.transposed_carrier(writer, layer), weights.row_scale(writer, layer)
    if low_rank.reads_integers(layer):
        carrier = writer.op("Concat", carrier, low_rank.transposed_down(writer, layer), name="weight.joined", axis=1)
        scale = writer.op("Concat", scale, low_rank.down_scale(writer, layer), name="weight.scales", axis=0)
    pieces = writer.ops("Split", count, carrier, name="weight.group", axis=0, num_outputs=count)
    return [writer.op("DequantizeLinear", piece, scale, name="weight.dequantized", axis=1) for piece in pieces]
