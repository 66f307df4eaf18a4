"""Weights of float inputs as TensorRT keeps them in few bits: int4 in blocks, int8 by rows; the product is in half precision.

4 bits, evenly spaced, groups    DequantizeLinear(int4, group scales) -> Transpose -> MatMul
one scale a row                  DequantizeLinear(int8, row scales) -> MatMul
"""

from __future__ import annotations

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
    """Whether int4 in blocks holds the weight as it is."""
    if layer.bits != 4 or layer.multiplier is not None or layer.scale.dim() != 2 or layer.scale.shape[1] < 2:
        return False
    block = layer.in_features // layer.scale.shape[1]
    return block % _SMALLEST_BLOCK == 0 and weights.even_levels(layer) == (1, 8) and layer.carrier_kind is not FLOAT8


def _has_row_scale(layer: QuantLinear) -> bool:
    return layer.carrier_kind is not FLOAT8 and (layer.scale.dim() == 1 or layer.scale.shape[1] == 1)


def half_weight(writer: Writer, layer: QuantLinear) -> ir.Value:
    """W^T [I, O] in half precision, as the output of a DequantizeLinear or its Transpose."""
    if not is_int4(layer):
        scale = writer.op("Cast", weights.row_scale(writer, layer), name="weight.scale.half", to=HALF)
        carrier = weights.transposed_carrier(writer, layer)
        weight = writer.op("DequantizeLinear", carrier, scale, name="weight.dequantized", axis=1)
    else:
        scale = writer.op("Cast", writer.state(f"{layer.site}.scale", layer.scale), name="weight.scale.half", to=HALF)
        codes = writer.op("Cast", weights.carrier_matrix(writer, layer), name="weight.int4", to=ir.DataType.INT4)
        block = layer.in_features // layer.scale.shape[1]
        blocks = writer.op("DequantizeLinear", codes, scale, name="weight.dequantized", axis=1, block_size=block)
        weight = writer.op("Transpose", blocks, name="weight.transposed", perm=[1, 0])
    weight.type = ir.TensorType(HALF)
    return weight
