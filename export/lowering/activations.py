"""Activation quantization in the form that ONNX Runtime fuses into an integer matmul: uint8 with zero point 128.

Symmetric integers in [-127, 127] become unsigned by adding 128, with the same result. Per token, the scale is taken out
by a division, the rest is quantized with scale 1, and the scale returns after the product:

    s = max(max|x| / divisor, 1e-8)    x/s -> QuantizeLinear(1, 128) -> DequantizeLinear(1, 128) -> MatMul -> * s

With a scale a group of channels, each group is quantized so, and is an operand of its own.

Levels beyond a clipped range are cut off after rounding, on bytes, which is the same as before it and a quarter of the
memory. A mid-rise grid makes n the odd integer 2n + 1 on bytes as well: with n + 64 in [0, 127], a shift
to the left and a one in the last bit give 2n + 1 + 128.

Unsigned integers have zero point 0, and the bias holds what their shift adds.

The scale of a timestep bin comes the same way: the bin is the number of edges that the timestep lies below.

The operations and their order are those of numerics/activation_format.py, so that both round alike.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.lowering.writer import Writer
from ditq.nn.call_timestep import ARGUMENT
from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.uniform import SMALLEST_SCALE

ZERO_POINT = 128
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def per_token(writer: Writer, x: ir.Value, form: ActivationFormat) -> tuple[ir.Value, ir.Value]:
    """x [..., I] -> (integers as the output of a DequantizeLinear [..., I], what one of them stands for [..., 1])."""
    steps, scale = own_steps(writer, x, form)
    return _unit_scale(writer, steps, scale, form, saturates=form.clip < 1)


def per_group(
    writer: Writer, x: ir.Value, rank: int, width: int, form: ActivationFormat
) -> list[tuple[ir.Value, ir.Value]]:
    """x [..., width] of that rank -> for each group of channels, as `per_token` of it alone."""
    size, leading = form.group_size, [0] * (rank - 1)  # in a Reshape, 0 keeps the dimension
    count = width // size

    def shaped(value: ir.Value, *last: int, name: str) -> ir.Value:
        return writer.op("Reshape", value, writer.constant([*leading, *last], np.int64, name="shape"), name=name)

    steps, scale = own_steps(writer, shaped(x, count, size, name="groups"), form)
    q = shaped(_integers(writer, steps, form, saturates=form.clip < 1), width, name="integers")
    unit = shaped(unit_of(writer, scale, form), count, name="units")
    integers = writer.ops("Split", count, q, name="integers.group", axis=-1, num_outputs=count)
    units = writer.ops("Split", count, unit, name="unit.group", axis=-1, num_outputs=count)
    return [(_dequantized(writer, part, np.float32(1)), one) for part, one in zip(integers, units, strict=True)]


def own_steps(writer: Writer, x: ir.Value, form: ActivationFormat) -> tuple[ir.Value, ir.Value]:
    """x [..., n] -> (x / s, or (x + t) / s, s [..., 1]) with the scale of its own along the last axis."""
    if form.grid == "unsigned":
        axis = writer.constant([-1], np.int64, name="last_axis")
        x = writer.op("Add", x, writer.constant(form.shift, np.float32, name="shift"), name="shifted")
        largest = writer.op("ReduceMax", x, axis, name="maximum", keepdims=1)
        return in_steps(writer, x, _step(writer, largest, form))
    return in_steps(writer, x, _step(writer, largest_magnitude(writer, x, -1), form))


def in_steps(writer: Writer, x: ir.Value, scale: ir.Value) -> tuple[ir.Value, ir.Value]:
    return writer.op("Div", x, scale, name="in_steps"), scale


def largest_magnitude(writer: Writer, x: ir.Value, axis: int) -> ir.Value:
    """max|x| along one axis, which stays as 1."""
    axes = writer.constant([axis], np.int64, name="last_axis" if axis == -1 else "axis")
    # by two reductions: Abs would write the whole tensor once more
    lowest = writer.op("Neg", writer.op("ReduceMin", x, axes, name="minimum", keepdims=1), name="negated_minimum")
    return writer.op("Max", writer.op("ReduceMax", x, axes, name="maximum", keepdims=1), lowest, name="absmax")


def _step(writer: Writer, largest: ir.Value, form: ActivationFormat) -> ir.Value:
    scale = writer.op("Div", largest, writer.constant(form.divisor, np.float32, name="divisor"), name="step")
    smallest = writer.constant(SMALLEST_SCALE, np.float32, name="smallest_scale")
    return writer.op("Max", scale, smallest, name="token_scale")


def per_timestep(writer: Writer, x: ir.Value, scale: ir.Value, form: ActivationFormat) -> tuple[ir.Value, ir.Value]:
    """As `per_token`, but with the scale [B] of each timestep bin given: what one integer stands for is [1]."""
    steps, step = in_steps(writer, x, scale_of_bin(writer, scale, form))
    return _unit_scale(writer, steps, step, form, saturates=True)


def scale_of_bin(writer: Writer, scale: ir.Value, form: ActivationFormat) -> ir.Value:
    """The scale [1] of the timestep bin that holds, of those of all bins [B]."""
    timestep = next((value for value in writer.graph.inputs if value.name == ARGUMENT), None)
    if timestep is None:
        raise DitqError(f"{writer.scope}: its input has a scale a timestep bin, but the graph has no input {ARGUMENT}")
    every, first = (writer.constant([number], np.int64, name="axis") for number in (-1, 0))
    flat = writer.op("Reshape", timestep, every, name="timesteps")
    one = writer.op("Cast", writer.op("Gather", flat, first, name="timestep"), name="timestep.float", to=FLOAT)
    below = writer.op("Less", one, writer.constant(form.edges, np.float32, name="edges"), name="below_edges")
    number = writer.op("ReduceSum", writer.op("Cast", below, name="passed", to=INT64), first, name="bin", keepdims=1)
    return writer.op("Gather", scale, number, name="bin_scale")


def _unit_scale(
    writer: Writer, steps: ir.Value, scale: ir.Value, form: ActivationFormat, saturates: bool
) -> tuple[ir.Value, ir.Value]:
    q = _integers(writer, steps, form, saturates)
    zero_point = 0 if form.grid == "unsigned" else ZERO_POINT
    return _dequantized(writer, q, np.float32(1), zero_point), unit_of(writer, scale, form)


def unit_of(writer: Writer, scale: ir.Value, form: ActivationFormat) -> ir.Value:
    """s -> what one integer stands for."""
    if form.grid != "midrise":
        return scale
    return writer.op("Mul", scale, writer.constant(0.5, np.float32, name="half"), name="half_step")


def per_tensor(writer: Writer, x: ir.Value, scale: Tensor, form: ActivationFormat) -> ir.Value:
    """x [..., I] -> q * step as the output of a DequantizeLinear, q clipped to the format's range."""
    step = np.float32(form.unit(scale).item())
    if form.grid == "midrise":
        steps = writer.op("Div", x, writer.constant(scale.item(), np.float32, name="tensor_scale"), name="in_steps")
        return _dequantized(writer, _integers(writer, steps, form, saturates=True), step)
    # uint8 has one value below -127: without the clip, saturation would reach it
    limit = np.float32(form.maximum) * step
    low, high = writer.constant(-limit, np.float32, name="limit"), writer.constant(limit, np.float32, name="limit")
    clipped = writer.op("Clip", x, low, high, name="clipped")
    return _dequantized(writer, quantized(writer, clipped, step, ZERO_POINT), step)


def _integers(writer: Writer, steps: ir.Value, form: ActivationFormat, saturates: bool) -> ir.Value:
    """x / s -> q + 128, or unsigned q, uint8; without `saturates`, no value is beyond the format's range."""
    one, limit = np.float32(1), form.maximum
    if form.grid == "midrise":
        steps = writer.op("Sub", steps, writer.constant(0.5, np.float32, name="half"), name="from_middle")
        n = _clipped(writer, quantized(writer, steps, one, 64), 64 - limit, 64 + limit - 1)
        bit = writer.constant(1, np.uint8, name="bit")
        return writer.op("BitwiseOr", writer.op("BitShift", n, bit, name="doubled", direction="LEFT"), bit, name="odd")
    if form.grid == "unsigned":
        q = quantized(writer, steps, one, 0)
        return _clipped(writer, q, 0, limit) if saturates and limit < 255 else q
    q = quantized(writer, steps, one, ZERO_POINT)
    return _clipped(writer, q, ZERO_POINT - limit, ZERO_POINT + limit) if saturates else q


def _clipped(writer: Writer, q: ir.Value, low: int, high: int) -> ir.Value:
    bounds = [writer.constant(bound, np.uint8, name="limit") for bound in (low, high)]
    return writer.op("Clip", q, *bounds, name="clipped")


def quantized(writer: Writer, x: ir.Value, step: np.float32, zero_point: int) -> ir.Value:
    """round(x / step) + zero point, uint8."""
    scale = writer.constant(step, np.float32, name="activation_scale")
    return writer.op(
        "QuantizeLinear", x, scale, writer.constant(zero_point, np.uint8, name="zero_point"), name="quantized"
    )


def _dequantized(writer: Writer, q: ir.Value, step: np.float32, zero_point: int = ZERO_POINT) -> ir.Value:
    scale = writer.constant(step, np.float32, name="activation_scale")
    zero = writer.constant(zero_point, np.uint8, name="zero_point")
    return writer.op("DequantizeLinear", q, scale, zero, name="dequantized")
