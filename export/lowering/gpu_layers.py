"""What a quantized linear becomes for a GPU's runtime: a product of 8-bit or FP4 numbers, of few-bit weights, or of floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from ditq.export.lowering import eight_bit, four_bit, low_rank, weights
from ditq.export.lowering.layers import Made
from ditq.export.lowering.writer import Writer
from ditq.export.targets import Kind
from ditq.nn import ActivationFormat, QuantLinear
from ditq.numerics.carrier import FLOAT4, FLOAT8


class FewBitWeights(Protocol):
    """The weights of float inputs that a runtime keeps in few bits: a module of `lowering`."""

    def has_form(self, layer: QuantLinear) -> bool: ...

    def multiplied(self, writer: Writer, x: ir.Value, layer: QuantLinear) -> ir.Value: ...


@dataclass
class GpuLayers:
    """Makes layers. form: of products of 8-bit numbers; few_bit: of float inputs; check: raises for inputs that have no form.

    `matmuls` is what the products of 8-bit numbers make, which is not to be multiplied in half precision again.
    """

    writer: Writer
    form: eight_bit.Form
    few_bit: FewBitWeights
    check: Callable[[QuantLinear], None]
    numbers: dict[tuple[ir.Value, ActivationFormat, tuple[float, ...]], eight_bit.Numbers] = field(default_factory=dict)
    matmuls: set[ir.Value] = field(default_factory=set)
    fp4: dict[tuple[ir.Value, float], ir.Value] = field(default_factory=dict)

    def made(self, x: ir.Value, rank: int, layer: QuantLinear, rows: ir.Value | None) -> Made:
        """All that the layer makes of the transformed input; rows are chosen in front of it here."""
        assert rows is None
        if layer.activation.grid == FLOAT4.name:
            return self._four_bit(x, layer)
        if layer.activation.granularity != "none":
            return self._eight_bit(x, rank, layer)
        writer, inner = self.writer, None
        if self.few_bit.has_form(layer):
            kind: Kind = "weight-only kernel"
            product = self.few_bit.multiplied(writer, x, layer)
            inner = low_rank.float_inner(writer, x, layer) if layer.rank else None
        else:
            kind, product = "dequantized", writer.op("MatMul", x, weights.float_weight(writer, layer), name="matmul")
        return Made(kind, product, self._finished(product, inner, x, layer))

    def _eight_bit(self, x: ir.Value, rank: int, layer: QuantLinear) -> Made:
        self.check(layer)
        calibrated = layer.activation_scale
        key = (x, layer.activation, () if calibrated is None else tuple(calibrated.reshape(-1).tolist()))
        if key not in self.numbers:  # once for all layers of one input and format
            self.numbers[key] = eight_bit.quantized(self.writer, x, rank, layer, self.form)
        product = eight_bit.multiplied(self.writer, self.numbers[key], x, rank, layer)
        self.matmuls |= {product.matmul} if product.inner_matmul is None else {product.matmul, product.inner_matmul}
        kind: Kind = "float8" if layer.activation.grid == FLOAT8.name else "integer"
        y = self._finished(product.total, product.inner, x, layer)
        return Made(kind, product.matmul, y, product.inner_matmul)

    def _four_bit(self, x: ir.Value, layer: QuantLinear) -> Made:
        self.check(layer)
        assert layer.activation_scale is not None
        key = (x, layer.activation_scale.item())
        if key not in self.fp4:  # once for all layers of one input
            self.fp4[key] = four_bit.quantized(self.writer, x, layer)
        matmul, y = four_bit.multiplied(self.writer, self.fp4[key], layer)
        return Made("float4", matmul, self._finished(y, None, x, layer))

    def _finished(self, y: ir.Value, inner: ir.Value | None, x: ir.Value, layer: QuantLinear) -> ir.Value:
        """y with the branch, whose inner values are given or made of x, and the bias."""
        if low_rank.reads_float(layer):
            inner = low_rank.float_inner(self.writer, x, layer)
        if inner is not None:
            y = low_rank.with_branch(self.writer, y, inner, layer)
        if layer.bias is None:
            return y
        return self.writer.op("Add", y, self.writer.state(f"{layer.site}.bias", layer.bias), name="biased")
