"""Products of FP4 numbers in blocks of 16 with FP8 scales (NVFP4), as GPUs from Blackwell on multiply them.

    x        FP4Input: FP4 numbers * block scales (FP8) * scale of the tensor \\
    weight   FP4Weight: FP4 numbers * block scales (FP8) * 2^-b                MatMul in half precision -> * 2^b s_w in float32

ONNX has the FP4 type, but no operator that finds the scales of blocks at run time, and ONNX Runtime computes nothing in FP4. So
both are functions of the graph: their bodies say in standard operators what they mean, and so any runtime can run them; where
a plan is built, TensorRT's own operators for FP4 take their place (`plans/four_bit.py`).

The power of two keeps the largest sum that can be within what float16 holds, as in `lowering/eight_bit.py`. The scale of a
row stands behind the product, since TensorRT takes only one for a tensor in front of it.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx import parser
from torch import Tensor

from ditq.export.lowering import weights
from ditq.export.lowering.writer import Writer
from ditq.export.onnx_graph import OPSET
from ditq.nn import QuantLinear

DOMAIN = "ditq.fp4"
INPUT, WEIGHT = "FP4Input", "FP4Weight"
_LARGEST_HALF = 65504

# numbers: FP4 numbers * block scales, for whoever compares them; nothing in the graph reads them.
_INPUT = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{INPUT} (x, scale) => (dequantized, numbers) {{
    largest_step = Constant <value_float = 2688.0> ()
    smallest_step = Neg (largest_step)
    steps = Div (x, scale)
    clipped = Clip (steps, smallest_step, largest_step)
    leading = Shape <start = 0, end = -1> (x)
    run = Constant <value_ints = [-1, 16]> ()
    apart = Concat <axis = 0> (leading, run)
    runs = Reshape (clipped, apart)
    magnitudes = Abs (runs)
    last = Constant <value_ints = [-1]> ()
    largest = ReduceMax (magnitudes, last)
    six = Constant <value_float = 6.0> ()
    wanted = Div (largest, six)
    block_fp8 = Cast <to = 17> (wanted)
    block = Cast <to = 1> (block_fp8)
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    half = Constant <value_float = 0.5> ()
    any = Greater (block, zero)
    divisor = Where (any, block, one)
    units = Div (runs, divisor)
    size = Abs (units)
    below_two = Less (size, two)
    below_four = Less (size, four)
    coarse = Where (below_four, one, two)
    spacing = Where (below_two, half, coarse)
    counted = Div (units, spacing)
    whole = Round (counted)
    nearest = Mul (whole, spacing)
    lowest = Neg (six)
    fp4 = Clip (nearest, lowest, six)
    products = Mul (fp4, block)
    shape = Shape (x)
    numbers = Reshape (products, shape)
    dequantized = Mul (numbers, scale)
}}
"""
_WEIGHT = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{WEIGHT} (numbers, blocks, scale) => (weight) {{
    blocks_float = Cast <to = 1> (blocks)
    scales = Mul (blocks_float, scale)
    last = Constant <value_ints = [-1]> ()
    columns = Unsqueeze (scales, last)
    run = Constant <value_ints = [0, -1, 16]> ()
    runs = Reshape (numbers, run)
    products = Mul (runs, columns)
    shape = Shape (numbers)
    weight = Reshape (products, shape)
}}
"""


def quantized(writer: Writer, x: ir.Value, layer: QuantLinear) -> ir.Value:
    """x [..., I] as the layer's products see it, float32."""
    scale = writer.constant(_calibrated(layer).item(), np.float32, name="tensor_scale")
    dequantized, _ = _called(writer, _INPUT, INPUT, 2, x, scale, name="fp4_input")
    return dequantized


def multiplied(writer: Writer, x: ir.Value, layer: QuantLinear) -> tuple[ir.Value, ir.Value]:
    """x [..., I] as `quantized` gives it -> (what the product makes, x W^T [..., O]), without the bias; to be multiplied in
    half precision (`lowering/half.py`)."""
    assert layer.multiplier is not None
    power = _power(layer)
    blocks = writer.state(f"{layer.site}.multiplier", layer.multiplier)
    scale = writer.constant(2.0**-power, np.float32, name="power_of_two")
    numbers = weights.number_matrix(writer, layer)
    (weight,) = _called(writer, _WEIGHT, WEIGHT, 1, numbers, blocks, scale, name="fp4_weight")
    matmul = writer.op("MatMul", x, writer.op("Transpose", weight, name="weight", perm=[1, 0]), name="matmul")
    back = writer.constant(2.0**power, np.float32, name="back")
    row = writer.op("Mul", weights.row_scale(writer, layer), back, name="weight.scale")
    return matmul, writer.op("Mul", matmul, row, name="scaled")


def _called(writer: Writer, text: str, kind: str, outputs: int, *inputs: ir.Value, name: str) -> tuple[ir.Value, ...]:
    """What a function of this file makes of the inputs; it joins the model with its first call."""
    function = ir.serde.deserialize_function(parser.parse_function(text))
    writer.model.functions.setdefault(function.identifier(), function)
    return tuple(writer.ops(kind, outputs, *inputs, name=name, domain=DOMAIN))


def _calibrated(layer: QuantLinear) -> Tensor:
    assert layer.activation_scale is not None
    return layer.activation_scale


def _power(layer: QuantLinear) -> int:
    """b such that no sum of I products of inputs up to 2688 s with numbers times block scales up to 2688 is beyond float16."""
    largest = layer.activation.maximum
    return math.ceil(math.log2(layer.in_features * largest**2 * _calibrated(layer).item() / _LARGEST_HALF))
