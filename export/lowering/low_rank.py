"""The low-rank branch of a quantized linear in ONNX: (z A^T) B^T beside the coded product, from int8 factors in the file.

Where z is the quantized input, the rows of A belong to the same integer product as the carrier's. They are multiplied in a
product of their own all the same: joined, the outputs would have to be copied apart again, which takes longer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.writer import Writer
from ditq.nn import QuantLinear


def reads_integers(layer: QuantLinear) -> bool:
    """Whether there is a branch on the quantized input."""
    return layer.rank > 0 and layer.activation.granularity != "none" and layer.branch == "integer"


def reads_float(layer: QuantLinear) -> bool:
    """Whether there is a branch on the input as it was before it was quantized."""
    return layer.rank > 0 and layer.activation.granularity != "none" and layer.branch == "float"


def integer_inner(writer: Writer, integers: ir.Value, layer: QuantLinear) -> ir.Value:
    """q (s_a A)^T [..., r], which runs as an integer kernel; `integers` as of `lowering/activations.py`."""
    down = writer.op(
        "DequantizeLinear", transposed_down(writer, layer), down_scale(writer, layer), name="down.dequantized", axis=1
    )
    return writer.op("MatMul", integers, down, name="inner")


def float_inner(writer: Writer, x: ir.Value, layer: QuantLinear) -> ir.Value:
    """x (s_a A)^T [..., r] in float; x [..., I] is the transformed input, not quantized."""
    return writer.op("MatMul", x, _float_down(writer, layer), name="inner")


def add_branch(writer: Writer, y: ir.Value, inner: ir.Value, rank: int, layer: QuantLinear) -> ir.Value:
    """y [..., O] + inner B^T + bias; inner [..., r], of `rank` dimensions.

    The bias goes into the product, as the row of one more inner value that is always 1. An addition over all outputs is
    as dear as the product itself: so the branch costs one of them, not two.
    """
    up = _float_up(writer, layer)
    if layer.bias is not None:
        ends = writer.constant([0] * (2 * rank - 1) + [1], np.int64, name="ends")
        inner = writer.op("Pad", inner, ends, writer.constant(1, np.float32, name="one"), name="inner.one")
        first = writer.constant([0], np.int64, name="axis")
        bias = writer.op("Unsqueeze", writer.state(f"{layer.site}.bias", layer.bias), first, name="bias.row")
        up = writer.op("Concat", up, bias, name="up.bias", axis=0)
    return writer.op("Add", y, writer.op("MatMul", inner, up, name="branch"), name="with_branch")


def with_branch(writer: Writer, y: ir.Value, inner: ir.Value, layer: QuantLinear) -> ir.Value:
    """y [..., O] + inner B^T, without the bias: for runtimes that add in the kernel that stands there anyway."""
    return writer.op("Add", y, writer.op("MatMul", inner, _float_up(writer, layer), name="branch"), name="with_branch")


def add_to_weight(writer: Writer, weight: ir.Value, layer: QuantLinear) -> ir.Value:
    """W^T [I, O] in float with the branch added to it, folded at load: it then costs nothing."""
    branch = writer.op("MatMul", _float_down(writer, layer), _float_up(writer, layer), name="weight.branch")
    return writer.op("Add", weight, branch, name="weight.with_branch")


def down_scale(writer: Writer, layer: QuantLinear) -> ir.Value:
    """s_a [r]."""
    assert layer.branch_scale is not None
    return writer.state(f"{layer.site}.branch_scale", layer.branch_scale)


def transposed_down(writer: Writer, layer: QuantLinear) -> ir.Value:
    """A^T int8 [I, r]."""
    assert layer.down is not None
    return writer.op("Transpose", writer.state(f"{layer.site}.down", layer.down), name="down.transposed", perm=[1, 0])


def _float_down(writer: Writer, layer: QuantLinear) -> ir.Value:
    """(s_a A)^T [I, r] in float, folded at load."""
    floats = writer.op("Cast", transposed_down(writer, layer), name="down.float", to=ir.DataType.FLOAT)
    return writer.op("Mul", floats, down_scale(writer, layer), name="down.scaled")


def _float_up(writer: Writer, layer: QuantLinear) -> ir.Value:
    """B^T [r, O] in float, folded at load."""
    assert layer.up is not None
    turned = writer.op("Transpose", writer.state(f"{layer.site}.up", layer.up), name="up.transposed", perm=[1, 0])
    return writer.op("Cast", turned, name="up.float", to=ir.DataType.FLOAT)
