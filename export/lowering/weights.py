"""Coded weights in ONNX: the file holds packed codes, which the runtime folds into int8 (or float) when it loads them.

The bytes of the state dict are the initializers. A byte is an index into a table of what its codes stand for, so one
Gather decodes two 4-bit codes, or spreads one bit plane over eight columns; all of it disappears at load.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ditq.export.lowering import low_rank
from ditq.export.lowering.writer import Writer
from ditq.nn import QuantLinear
from ditq.numerics.carrier import INT8

_BYTES = np.arange(256)
_SMALLEST_BLOCK = 16  # of com.microsoft.MatMulNBits, which also wants a power of two


def transposed_carrier(writer: Writer, layer: QuantLinear) -> ir.Value:
    """The int8 carrier [I, O]. Transposed before it is dequantized: the runtime then folds it 10x faster."""
    return writer.op("Transpose", carrier_matrix(writer, layer), name="weight", perm=[1, 0])


def integer_weight(writer: Writer, layer: QuantLinear) -> ir.Value:
    """W^T [I, O] as DequantizeLinear(carrier, row scale), which fuses with a quantized input into an integer matmul."""
    carrier, scale = transposed_carrier(writer, layer), row_scale(writer, layer)
    return writer.op("DequantizeLinear", carrier, scale, name="weight.dequantized", axis=1)


def row_scale(writer: Writer, layer: QuantLinear) -> ir.Value:
    """The one scale that each row has, [O]."""
    scale = writer.state(f"{layer.site}.scale", layer.scale)
    if layer.scale.dim() == 1:
        return scale
    return writer.op("Reshape", scale, writer.constant([-1], np.int64, name="shape"), name="weight.scale")


def float_weight(writer: Writer, layer: QuantLinear) -> ir.Value:
    """W^T [I, O] in float, folded at load, with the branch unless that reads another input than the codes.

    Not by DequantizeLinear: ONNX Runtime makes that a slow 8-bit kernel.
    """
    weight = _float_codes(writer, layer)
    return weight if not layer.rank or low_rank.reads_float(layer) else low_rank.add_to_weight(writer, weight, layer)


def _float_codes(writer: Writer, layer: QuantLinear) -> ir.Value:
    if layer.scale.dim() == 1 or layer.scale.shape[1] == 1:
        flat = row_scale(writer, layer)
        carrier = writer.op("Cast", transposed_carrier(writer, layer), name="weight.float", to=ir.DataType.FLOAT)
        return writer.op("Mul", carrier, flat, name="weight.scaled")
    scale = writer.state(f"{layer.site}.scale", layer.scale)
    groups = layer.scale.shape[1]
    carrier = writer.op("Cast", carrier_matrix(writer, layer), name="weight.float", to=ir.DataType.FLOAT)
    shape = writer.constant([layer.out_features, groups, layer.in_features // groups], np.int64, name="shape")
    grouped = writer.op("Reshape", carrier, shape, name="weight.groups")
    column = writer.op("Unsqueeze", scale, writer.constant([-1], np.int64, name="last_axis"), name="weight.scale")
    scaled = writer.op("Mul", grouped, column, name="weight.scaled")
    flat = writer.op("Reshape", scaled, _matrix_shape(writer, layer), name="weight.flat")
    return writer.op("Transpose", flat, name="weight.transposed", perm=[1, 0])


def has_block_kernel(layer: QuantLinear) -> bool:
    """Whether com.microsoft.MatMulNBits takes this weight: 4 bits, evenly spaced levels, group scales, a good block."""
    if layer.bits != 4 or layer.scale.dim() != 2 or layer.scale.shape[1] < 2 or layer.multiplier is not None:
        return False
    group = layer.in_features // layer.scale.shape[1]
    return group >= _SMALLEST_BLOCK and math.log2(group).is_integer() and _even_levels(layer) is not None


def block_matmul(writer: Writer, x: ir.Value, layer: QuantLinear) -> ir.Value:
    """x W^T by MatMulNBits, in float32 arithmetic (accuracy level 1). Its blocks are our packed bytes as they are."""
    levels = _even_levels(layer)
    assert levels is not None
    spacing, zero = levels
    rows, groups = layer.scale.shape
    group = layer.in_features // groups
    shape = writer.constant([rows, groups, group // 2], np.int64, name="shape")
    codes = writer.op("Reshape", writer.state(f"{layer.site}.codes", layer.codes), shape, name="weight.blocks")
    scale = writer.state(f"{layer.site}.scale", layer.scale)
    if spacing != 1:
        scale = writer.op("Mul", scale, writer.constant(spacing, np.float32, name="spacing"), name="weight.scale")
    zero_points = None
    if zero != 8:  # the kernel's own default
        packed = np.full((rows, (groups + 1) // 2), zero * 17, np.uint8)
        zero_points = writer.constant(packed, name="zero_points")
    settings = {"K": layer.in_features, "N": rows, "bits": 4, "block_size": group, "accuracy_level": 1}
    return writer.op("MatMulNBits", x, codes, scale, zero_points, name="matmul", domain="com.microsoft", **settings)


def _even_levels(layer: QuantLinear) -> tuple[int, int] | None:
    """(spacing, code of zero) when the table is spacing * (code - zero), else None."""
    if layer.table is None or layer.table.dim() != 1:
        return None
    exact = layer.table.float().numpy()
    table = exact.astype(np.int64)
    if (table != exact).any():
        return None
    steps = np.diff(table)
    spacing = int(steps[0])
    if spacing <= 0 or (steps != spacing).any() or table[0] % spacing:
        return None
    zero = -int(table[0]) // spacing
    return (spacing, zero) if 0 <= zero < 16 else None


def _matrix_shape(writer: Writer, layer: QuantLinear) -> ir.Value:
    return writer.constant([layer.out_features, layer.in_features], np.int64, name="shape")


def carrier_matrix(writer: Writer, layer: QuantLinear) -> ir.Value:
    """The carrier [O, I]: int8; in float32 where it is FP8, which the runtime only casts."""
    carrier = number_matrix(writer, layer)
    return carrier if layer.multiplier is None else _multiplied(writer, layer, carrier)


def number_matrix(writer: Writer, layer: QuantLinear) -> ir.Value:
    """What the codes [O, I] stand for in the table, without multipliers of groups; of the type of `carrier_matrix`."""
    codes = writer.state(f"{layer.site}.codes", layer.codes)
    if layer.bits == 8:
        return _widened(writer, layer, codes)
    assert layer.table is not None
    return _looked_up(writer, layer, codes) if layer.table.dim() == 1 else _looked_up_by_row(writer, layer, codes)


def _widened(writer: Writer, layer: QuantLinear, numbers: ir.Value) -> ir.Value:
    """Numbers in floating point in float32; others as they are."""
    if layer.carrier_kind is INT8:
        return numbers
    return writer.op("Cast", numbers, name="carrier.widened", to=ir.DataType.FLOAT)


def _looked_up(writer: Writer, layer: QuantLinear, codes: ir.Value) -> ir.Value:
    assert layer.table is not None
    table = (layer.table if layer.carrier_kind is INT8 else layer.table.float()).numpy()
    if layer.bits == 4:
        pairs = np.stack((table[_BYTES & 15], table[_BYTES >> 4]), axis=1)
        index = writer.op("Cast", codes, name="codes.index", to=ir.DataType.INT32)
        return _flat(
            writer, layer, writer.op("Gather", writer.constant(pairs, name="table"), index, name="codes.pairs")
        )
    index = writer.op("Cast", _from_planes(writer, layer, codes), name="codes.index", to=ir.DataType.INT32)
    return writer.op("Gather", writer.constant(table, name="table"), index, name="carrier")


def _looked_up_by_row(writer: Writer, layer: QuantLinear, codes: ir.Value) -> ir.Value:
    assert layer.table is not None
    if layer.bits == 4:
        nibbles = writer.constant(np.stack((_BYTES & 15, _BYTES >> 4), axis=1), np.int32, name="nibbles")
        index = writer.op("Cast", codes, name="codes.bytes", to=ir.DataType.INT32)
        index = _flat(writer, layer, writer.op("Gather", nibbles, index, name="codes.pairs"))
    else:
        index = writer.op("Cast", _from_planes(writer, layer, codes), name="codes.index", to=ir.DataType.INT32)
    table = _widened(writer, layer, writer.state(f"{layer.site}.table", layer.table))
    return writer.op("GatherElements", table, index, name="carrier", axis=1)


def _from_planes(writer: Writer, layer: QuantLinear, planes: ir.Value) -> ir.Value:
    """Bit planes uint8 [bits, O, ceil(I/8)] -> codes uint8 [O, I]: plane p adds bit p to eight columns a byte."""
    index = writer.op("Cast", planes, name="codes.bytes", to=ir.DataType.INT32)
    split = writer.ops("Split", layer.bits, index, name="codes.plane", axis=0, num_outputs=layer.bits)
    codes: ir.Value | None = None
    for plane, part in enumerate(split):
        spread = ((_BYTES[:, None] >> np.arange(8)) & 1) << plane
        bits = writer.op("Gather", writer.constant(spread, np.uint8, name="plane"), part, name="codes.bits")
        codes = bits if codes is None else writer.op("BitwiseOr", codes, bits, name="codes.joined")
    assert codes is not None
    return _flat(writer, layer, codes)


def _flat(writer: Writer, layer: QuantLinear, spread: ir.Value) -> ir.Value:
    """[..., O, bytes, columns a byte] -> [O, I], without the columns that only pad the last byte."""
    a_byte = 2 if layer.bits == 4 else 8
    padded = -(-layer.in_features // a_byte) * a_byte
    shape = writer.constant([layer.out_features, padded], np.int64, name="shape")
    flat = writer.op("Reshape", spread, shape, name="codes.flat")
    if padded == layer.in_features:
        return flat
    numbers = [writer.constant([number], np.int64, name="slice") for number in (0, layer.in_features, 1)]
    return writer.op("Slice", flat, *numbers, name="codes.unpadded")


def _multiplied(writer: Writer, layer: QuantLinear, carrier: ir.Value) -> ir.Value:
    """round(carrier * multiplier / 255) as int8, by groups of columns."""
    assert layer.multiplier is not None
    rows, groups = layer.multiplier.shape
    shape = writer.constant([rows, groups, layer.in_features // groups], np.int64, name="shape")
    floats = writer.op("Cast", writer.op("Reshape", carrier, shape, name="carrier.groups"), to=ir.DataType.FLOAT)
    multiplier = writer.state(f"{layer.site}.multiplier", layer.multiplier)
    factors = writer.op("Cast", multiplier, name="multiplier.float", to=ir.DataType.FLOAT)
    column = writer.op(
        "Unsqueeze", factors, writer.constant([-1], np.int64, name="last_axis"), name="multiplier.column"
    )
    product = writer.op("Mul", floats, column, name="carrier.product")
    product = writer.op("Div", product, writer.constant(255, np.float32, name="full"), name="carrier.quotient")
    rounded = writer.op("Cast", writer.op("Round", product, name="carrier.rounded"), to=ir.DataType.INT8)
    return writer.op("Reshape", rounded, _matrix_shape(writer, layer), name="carrier.multiplied")
