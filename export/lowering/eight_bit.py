"""Products of 8-bit numbers as GPUs multiply them: signed, zero point 0, one scale for a whole tensor.

In the form that TensorRT takes for such (`DEQUANTIZED`):

    n = x / s on its grid    QuantizeLinear(1) -> DequantizeLinear(2^-a) \\
                             carrier           -> DequantizeLinear(2^-b)  MatMul in half precision -> * 2^(a+b) s s_w in float32

The product leaves in 16 bits: the powers of two, which are exact, keep the largest sum that can be within what float16 holds.
And in the operator that says it outright (`INTEGERS`), whose sums are int32:

    n = x / s on its grid    QuantizeLinear(1) -> MatMulInteger with the carrier -> Cast -> * s s_w in float32

The scales of tokens, timesteps and rows stand behind the product, where TensorRT computes them in one kernel with the bias.
Numbers are whole before they are quantized, so any grid that int8 holds will do; FP8 numbers (E4M3) take the first way.

With a scale a group of channels there is one product with the groups as its batch, and a sum over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from ml_dtypes import float8_e4m3fn

from ditq.export.lowering import low_rank, weights
from ditq.export.lowering.activations import FLOAT, in_steps, own_steps, scale_of_bin, unit_of
from ditq.export.lowering.writer import Writer
from ditq.nn import QuantLinear
from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.carrier import FLOAT8, LARGEST_E4M3

_LARGEST_HALF = 65504
_ZEROS = {False: np.zeros((), np.int8), True: np.zeros((), float8_e4m3fn)}


@dataclass(frozen=True)
class Form:
    """operator: what multiplies; dequantizes: whether it reads numbers through DequantizeLinear, else as they are."""

    operator: str
    dequantizes: bool


DEQUANTIZED, INTEGERS = Form("MatMul", True), Form("MatMulInteger", False)


@dataclass(frozen=True, eq=False)
class Numbers:
    """numbers: the input on its 8-bit grid, as the form's operator reads it; unit: what one of them stands for."""

    numbers: ir.Value
    unit: ir.Value
    form: Form


@dataclass(frozen=True, eq=False)
class Product:
    """matmul, inner_matmul: what the products with the codes, and with the rows of a branch if those have their own, make;
    total [..., O] and inner [..., r]: what that stands for, in float32."""

    matmul: ir.Value
    total: ir.Value
    inner_matmul: ir.Value | None = None
    inner: ir.Value | None = None


def quantized(writer: Writer, x: ir.Value, rank: int, layer: QuantLinear, how: Form = DEQUANTIZED) -> Numbers:
    """x [..., I] of `rank` dimensions on the layer's grid; with a scale a group, as [groups, tokens, channels of one]."""
    form, width, calibrated = layer.activation, layer.in_features, layer.activation_scale
    if form.granularity == "group":
        return _grouped(writer, x, rank, layer, how)
    if calibrated is None:
        steps, scale = own_steps(writer, x, form)
    elif form.granularity == "timestep":
        bins = writer.state(f"{layer.site}.activation_scale", calibrated)
        steps, scale = in_steps(writer, x, scale_of_bin(writer, bins, form))
    else:
        steps, scale = in_steps(writer, x, writer.constant(calibrated.item(), np.float32, name="tensor_scale"))
    numbers = _as_read(writer, _on_grid(writer, steps, form), form, width, how)
    return Numbers(numbers, unit_of(writer, scale, form), how)


def multiplied(writer: Writer, numbers: Numbers, x: ir.Value, rank: int, layer: QuantLinear) -> Product:
    """The layer's products with the numbers of its input x [..., I] of `rank` dimensions, without the bias."""
    if layer.activation.granularity == "group":
        return _summed(writer, numbers, x, rank, layer)
    matmul, total = _product(writer, numbers, layer, weights.transposed_carrier(writer, layer), "matmul")
    total = writer.op("Mul", total, weights.row_scale(writer, layer), name="scaled")
    if not low_rank.reads_integers(layer):
        return Product(matmul, total)
    inner_matmul, inner = _product(writer, numbers, layer, low_rank.transposed_down(writer, layer), "inner")
    inner = writer.op("Mul", inner, low_rank.down_scale(writer, layer), name="inner.scaled")
    return Product(matmul, total, inner_matmul, inner)


def _product(writer: Writer, x: Numbers, layer: QuantLinear, carrier: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """(x carrier in half precision or int32, what that stands for in float32 but for the scales of the rows)."""
    weight, unit = carrier, x.unit
    if x.form.dequantizes:
        weight = _dequantized_weight(writer, carrier, layer)
        back = writer.constant(2.0 ** sum(_exponents(layer.activation, layer.in_features)), np.float32, name="back")
        unit = writer.op("Mul", x.unit, back, name="unit")
    matmul = writer.op(x.form.operator, x.numbers, weight, name=name)
    y = writer.op("Cast", matmul, name=f"{name}.float", to=FLOAT)
    return matmul, writer.op("Mul", y, unit, name=f"{name}.rescaled")


def _on_grid(writer: Writer, steps: ir.Value, form: ActivationFormat) -> ir.Value:
    """x / s -> its number on the grid, in 8 bits."""
    limit = float(form.maximum)
    if form.grid == "midrise":
        middle = writer.op("Sub", steps, writer.constant(0.5, np.float32, name="half"), name="from_middle")
        n = _clipped(writer, writer.op("Round", middle, name="rounded"), -limit, limit - 1)
        twice = writer.op("Mul", n, writer.constant(2, np.float32, name="two"), name="doubled")
        steps = writer.op("Add", twice, writer.constant(1, np.float32, name="one"), name="odd")
    elif form.grid == "unsigned":
        steps = _clipped(writer, steps, 0, limit)
    elif form.clip < 1 or form.granularity in ("tensor", "timestep"):
        steps = _clipped(writer, steps, -limit, limit)
    one = writer.constant(1, np.float32, name="one")
    return writer.op("QuantizeLinear", steps, one, _zero(writer, form), name="quantized")


def _clipped(writer: Writer, steps: ir.Value, low: float, high: float) -> ir.Value:
    bounds = [writer.constant(bound, np.float32, name="limit") for bound in (low, high)]
    return writer.op("Clip", steps, *bounds, name="clipped")


def _zero(writer: Writer, form: ActivationFormat) -> ir.Value:
    return writer.constant(_ZEROS[form.grid == FLOAT8.name], name="zero_point")


def _as_read(writer: Writer, q: ir.Value, form: ActivationFormat, width: int, how: Form) -> ir.Value:
    """8-bit numbers as the operator of the product reads them."""
    if not how.dequantizes:
        return q
    scale = writer.constant(2.0 ** -_exponents(form, width)[0], np.float16, name="power_of_two")
    return writer.op("DequantizeLinear", q, scale, _zero(writer, form), name="dequantized")


def _dequantized_weight(writer: Writer, carrier: ir.Value, layer: QuantLinear) -> ir.Value:
    if layer.activation.grid == FLOAT8.name:
        carrier = writer.op("Cast", carrier, name="weight.float8", to=ir.DataType.FLOAT8E4M3FN)
    scale = writer.constant(2.0 ** -_exponents(layer.activation, layer.in_features)[1], np.float16, name="power_of_two")
    # Without a zero point, which is 0: where ONNX Runtime makes weights uint8 (session.x64quantprecision), it stumbles over one
    # that two of them have in common.
    return writer.op("DequantizeLinear", carrier, scale, name="weight.dequantized")


def _exponents(form: ActivationFormat, width: int) -> tuple[int, int]:
    """(a, b): with inputs times 2^-a and weights times 2^-b no sum of `width` products leaves the range of float16.

    With a scale a group this holds for a group's sum, and so for fewer; the same for both keeps the formula one.
    """
    largest = LARGEST_E4M3**2 if form.grid == FLOAT8.name else 127.0 * 128.0
    total = max(0, math.ceil(math.log2(largest * width / _LARGEST_HALF)))
    return total // 2, total - total // 2


def _grouped(writer: Writer, x: ir.Value, rank: int, layer: QuantLinear, how: Form) -> Numbers:
    form = layer.activation
    size, count = form.group_size, layer.in_features // form.group_size
    apart = writer.constant([*[0] * (rank - 1), count, size], np.int64, name="shape")
    steps, scale = own_steps(writer, writer.op("Reshape", x, apart, name="groups"), form)
    numbers = _as_read(writer, _on_grid(writer, steps, form), form, layer.in_features, how)
    return Numbers(
        _groups_first(writer, numbers, count, size, "groups_first"),
        _groups_first(writer, unit_of(writer, scale, form), count, 1, "units"),
        how,
    )


def _groups_first(writer: Writer, x: ir.Value, count: int, size: int, name: str) -> ir.Value:
    """[..., groups, n] -> [groups, tokens, n]."""
    flat = writer.op("Reshape", x, writer.constant([-1, count, size], np.int64, name="shape"), name=f"{name}.flat")
    return writer.op("Transpose", flat, name=name, perm=[1, 0, 2])


def _summed(writer: Writer, numbers: Numbers, x: ir.Value, rank: int, layer: QuantLinear) -> Product:
    size, count = layer.activation.group_size, layer.in_features // layer.activation.group_size
    carrier, scale, rows = (
        weights.transposed_carrier(writer, layer),
        weights.row_scale(writer, layer),
        layer.out_features,
    )
    joined = low_rank.reads_integers(layer)
    if joined:
        carrier = writer.op("Concat", carrier, low_rank.transposed_down(writer, layer), name="weight.joined", axis=1)
        scale = writer.op("Concat", scale, low_rank.down_scale(writer, layer), name="weight.scales", axis=0)
        rows += layer.rank
    apart = writer.constant([count, size, rows], np.int64, name="shape")
    matmul, products = _product(
        writer, numbers, layer, writer.op("Reshape", carrier, apart, name="weight.groups"), "matmul"
    )
    first = writer.constant([0], np.int64, name="axis")
    total = writer.op("ReduceSum", products, first, name="summed", keepdims=0)
    total = writer.op("Mul", total, scale, name="scaled")
    last = writer.constant([rows], np.int64, name="rows")
    leading = writer.op(
        "Slice",
        writer.op("Shape", x, name="shape"),
        first,
        writer.constant([rank - 1], np.int64, name="slice"),
        name="leading",
    )
    total = writer.op("Reshape", total, writer.op("Concat", leading, last, name="shape", axis=0), name="tokens")
    if not joined:
        return Product(matmul, total)
    widths = writer.constant([layer.out_features, layer.rank], np.int64, name="widths")
    y, inner = writer.ops("Split", 2, total, widths, name="part", axis=-1)
    return Product(matmul, y, None, inner)
