"""Activation quantization in the form that ONNX Runtime fuses into an integer matmul: uint8 with zero point 128.

Symmetric integers in [-127, 127] become unsigned by adding 128, with the same result. Per token, the scale is taken out
by a division, the rest is quantized with scale 1, and the scale returns after the product:

    s = max(max|x| / q_max, 1e-8)    x/s -> QuantizeLinear(1, 128) -> DequantizeLinear(1, 128) -> MatMul -> * s

The operations and their order are those of numerics/uniform.py, so that both round alike.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ditq.export.lowering.writer import Writer
from ditq.numerics.uniform import SMALLEST_SCALE, largest_integer


def per_token(writer: Writer, x: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
    """x [..., I] -> (integers as the output of a DequantizeLinear [..., I], scale [..., 1])."""
    axis = writer.constant([-1], np.int64, name="last_axis")
    # max|x| by two reductions: Abs would write the whole tensor once more
    lowest = writer.op("Neg", writer.op("ReduceMin", x, axis, name="minimum", keepdims=1), name="negated_minimum")
    largest = writer.op("Max", writer.op("ReduceMax", x, axis, name="maximum", keepdims=1), lowest, name="absmax")
    scale = writer.op("Div", largest, writer.constant(largest_integer(bits), np.float32, name="q_max"), name="step")
    scale = writer.op(
        "Max", scale, writer.constant(SMALLEST_SCALE, np.float32, name="smallest_scale"), name="token_scale"
    )
    return _quantized(writer, writer.op("Div", x, scale, name="in_steps"), np.float32(1)), scale


def per_tensor(writer: Writer, x: ir.Value, scale: Tensor, bits: int) -> ir.Value:
    """x [..., I] -> q * scale as the output of a DequantizeLinear, q clipped to [-q_max, q_max]."""
    step = np.float32(scale.item())
    # uint8 has one value below -127: without the clip, saturation would reach it
    limit = np.float32(largest_integer(bits)) * step
    low, high = writer.constant(-limit, np.float32, name="limit"), writer.constant(limit, np.float32, name="limit")
    return _quantized(writer, writer.op("Clip", x, low, high, name="clipped"), step)


def _quantized(writer: Writer, x: ir.Value, step: np.float32) -> ir.Value:
    scale = writer.constant(step, np.float32, name="activation_scale")
    zero_point = writer.constant(128, np.uint8, name="zero_point")
    q = writer.op("QuantizeLinear", x, scale, zero_point, name="quantized")
    return writer.op("DequantizeLinear", q, scale, zero_point, name="dequantized")
