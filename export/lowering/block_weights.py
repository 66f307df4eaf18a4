"""Weights of float inputs as ONNX Runtime's CUDA provider keeps them in few bits: com.microsoft.MatMulNBits, in half precision.

4 bits    evenly spaced levels, as k from 0 to 15 of (k - 8) s
8 bits    any other int8 carrier c, as c + 128

Blocks have 32 columns where a group is made of such, which is the one size that the provider's mixed kernels take
(`ep.cuda.fpa_intb_gemm`), else 16; the scale of a group, or of a row, is repeated for each of its blocks. There are never zero
points, which those kernels do not take either.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering import weights
from ditq.export.lowering.half import HALF
from ditq.export.lowering.writer import MICROSOFT, Writer
from ditq.nn import QuantLinear
from ditq.numerics.carrier import FLOAT8

_BLOCKS = (32, 16)  # columns, the better first


def has_form(layer: QuantLinear) -> bool:
    """Whether blocks hold the weight as it is."""
    return layer.carrier_kind is not FLOAT8 and _block(layer) is not None


def multiplied(writer: Writer, x: ir.Value, layer: QuantLinear) -> ir.Value:
    """x W^T [..., O], to be multiplied in half precision (`lowering/half.py`), without a branch or bias."""
    block = _block(layer)
    assert block is not None
    spacing = _spacing(layer)
    codes = _bytes(writer, layer, block) if spacing is None else _nibbles(writer, layer, block, spacing)
    codes.type = ir.TensorType(ir.DataType.UINT8)
    scale = writer.op("Cast", _scales(writer, layer, block, spacing or 1), name="weight.scale.half", to=HALF)
    scale.type = ir.TensorType(HALF)
    settings = {"K": layer.in_features, "N": layer.out_features, "bits": 8 if spacing is None else 4}
    return writer.op("MatMulNBits", x, codes, scale, name="matmul", domain=MICROSOFT, block_size=block, **settings)


def bits(layer: QuantLinear) -> int:
    """In how many bits the GPU keeps the weight."""
    return 8 if _spacing(layer) is None else 4


def _block(layer: QuantLinear) -> int | None:
    groups = 1 if layer.scale.dim() == 1 else layer.scale.shape[1]
    return next((block for block in _BLOCKS if layer.in_features // groups % block == 0), None)


def _spacing(layer: QuantLinear) -> int | None:
    """Between levels, where they are this times whole numbers from -8 to 7 for all rows and groups; else None."""
    if layer.table is None or layer.table.dim() != 1 or layer.multiplier is not None:
        return None
    levels = layer.table.long()
    spacing = int(np.gcd.reduce(levels.numpy()))
    fits = spacing > 0 and bool((levels >= -8 * spacing).all() and (levels <= 7 * spacing).all())
    return spacing if fits else None


def _nibbles(writer: Writer, layer: QuantLinear, block: int, spacing: int) -> ir.Value:
    """uint8 [O, I / block, block / 2], the even column in the low half."""
    shape = [layer.out_features, layer.in_features // block, block // 2]
    if layer.table is not None and layer.bits == 4 and _are_codes(layer, spacing):  # as they lie in the file
        codes = writer.state(f"{layer.site}.codes", layer.codes)
        return writer.op("Reshape", codes, writer.constant(shape, np.int64, name="shape"), name="weight.blocks")
    levels = writer.op("Cast", weights.carrier_matrix(writer, layer), name="weight.levels", to=ir.DataType.INT32)
    numbers = writer.op("Div", levels, writer.constant(spacing, np.int32, name="spacing"), name="weight.numbers")
    numbers = writer.op("Add", numbers, writer.constant(8, np.int32, name="eight"), name="weight.codes")
    pairs = writer.op("Reshape", numbers, writer.constant([*shape, 2], np.int64, name="shape"), name="weight.pairs")
    placed = writer.op("Mul", pairs, writer.constant([1, 16], np.int32, name="places"), name="weight.placed")
    last = writer.constant([-1], np.int64, name="last_axis")
    packed = writer.op("ReduceSum", placed, last, name="weight.packed", keepdims=0)
    return writer.op("Cast", packed, name="weight.blocks", to=ir.DataType.UINT8)


def _are_codes(layer: QuantLinear, spacing: int) -> bool:
    """Whether the packed codes are k of (k - 8) s themselves."""
    assert layer.table is not None
    return layer.table.long().tolist() == [spacing * (code - 8) for code in range(16)]


def _bytes(writer: Writer, layer: QuantLinear, block: int) -> ir.Value:
    """uint8 [O, I / block, block]."""
    carrier = writer.op("Cast", weights.carrier_matrix(writer, layer), name="weight.levels", to=ir.DataType.INT32)
    middle = writer.constant(128, np.int32, name="middle")
    numbers = writer.op("Cast", writer.op("Add", carrier, middle, name="weight.codes"), to=ir.DataType.UINT8)
    shape = writer.constant([layer.out_features, layer.in_features // block, block], np.int64, name="shape")
    return writer.op("Reshape", numbers, shape, name="weight.blocks")


def _scales(writer: Writer, layer: QuantLinear, block: int, spacing: int) -> ir.Value:
    """float32 [O, I / block]."""
    rows, blocks = layer.out_features, layer.in_features // block
    groups = 1 if layer.scale.dim() == 1 else layer.scale.shape[1]
    scale = writer.state(f"{layer.site}.scale", layer.scale)
    if spacing != 1:
        scale = writer.op("Mul", scale, writer.constant(spacing, np.float32, name="spacing"), name="weight.scale")
    if blocks == groups and layer.scale.dim() == 2:
        return scale
    column = writer.constant([rows, groups, 1], np.int64, name="shape")
    repeated = writer.constant([rows, groups, blocks // groups], np.int64, name="shape")
    spread = writer.op("Expand", writer.op("Reshape", scale, column, name="weight.scale.column"), repeated)
    return writer.op("Reshape", spread, writer.constant([rows, blocks], np.int64, name="shape"), name="weight.scales")
