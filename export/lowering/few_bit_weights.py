"""Weights of float inputs as TensorRT keeps them in few bits: int4 in blocks, int8 by rows; the product is in half precision.

4 bits, evenly spaced, groups    DequantizeLinear(int4, group scales) -> Transpose -> MatMul
one scale a row                  DequantizeLinear(int8, row scales) -> MatMul
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering import weights
from ditq.export.lowering.half import HALF
from ditq.export.lowering.writer import Writer
from ditq.nn import QuantLinear
from ditq.numerics.carrier import FLOAT8

_SMALLEST_BLOCK = 16


def has_form(layer: QuantLinear) -> bool:
    """Whether the weight is one of those above."""
    return is_int4(layer) or _has_row_scale(layer)


def is_int4(layer: QuantLinear) -> bool:
    """Whether int4 in blocks holds the weight as it is: levels from -8 to 7, and several groups a row."""
    if layer.table is None or layer.multiplier is not None or layer.scale.dim() != 2 or layer.scale.shape[1] < 2:
        return False
    block, levels = layer.in_features // layer.scale.shape[1], layer.table.float()
    fits = bool((levels >= -8).all() and (levels <= 7).all())
    return fits and block % _SMALLEST_BLOCK == 0 and layer.carrier_kind is not FLOAT8


def _has_row_scale(layer: QuantLinear) -> bool:
    return layer.carrier_kind is not FLOAT8 and (layer.scale.dim() == 1 or layer.scale.shape[1] == 1)


def multiplied(writer: Writer, x: ir.Value, layer: QuantLinear) -> ir.Value:
    """x W^T [..., O], to be multiplied in half precision (`lowering/half.py`), without a branch or bias."""
    if is_int4(layer):
        return writer.op("MatMul", x, _int4_weight(writer, layer), name="matmul")
    # Twice the weight on half the input: TensorRT would join the product with a float16 one of the very same input, and
    # for that expand the weight to float16 at every call.
    halved = writer.op("Mul", x, writer.constant(0.5, np.float32, name="half"), name="halved")
    return writer.op("MatMul", halved, _int8_weight(writer, layer), name="matmul")


def _int8_weight(writer: Writer, layer: QuantLinear) -> ir.Value:
    """2 W^T [I, O]."""
    scale = writer.op(
        "Mul", weights.row_scale(writer, layer), writer.constant(2, np.float32, name="two"), name="weight.scale"
    )
    scale = writer.op("Cast", scale, name="weight.scale.half", to=HALF)
    carrier = weights.transposed_carrier(writer, layer)
    return _in_half(writer.op("DequantizeLinear", carrier, scale, name="weight.dequantized", axis=1))


def _int4_weight(writer: Writer, layer: QuantLinear) -> ir.Value:
    """W^T [I, O]."""
    scale = writer.op("Cast", writer.state(f"{layer.site}.scale", layer.scale), name="weight.scale.half", to=HALF)
    codes = writer.op("Cast", weights.carrier_matrix(writer, layer), name="weight.int4", to=ir.DataType.INT4)
    block = layer.in_features // layer.scale.shape[1]
    blocks = writer.op("DequantizeLinear", codes, scale, name="weight.dequantized", axis=1, block_size=block)
    return _in_half(writer.op("Transpose", blocks, name="weight.transposed", perm=[1, 0]))


def _in_half(weight: ir.Value) -> ir.Value:
    weight.type = ir.TensorType(HALF)
    return weight
