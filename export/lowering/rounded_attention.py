"""Attention with rounded parts (numerics/attention_rounding.py) in the forms that ONNX Runtime's CPU provider runs.

Rules:
  1. Where both parts of a product are int8, com.microsoft.MatMulIntegerToFloat multiplies them: as of all integer kernels
     it alone takes the scales of a batch of heads, [batch, heads, 1, columns]. Both sides are uint8 with zero point 128 (0
     for probabilities): for operands that are no constants, the kernel of uint8 and int8 saturates on x86 without VNNI.
  2. Where only one of them is, the product is one of floats, one of which was rounded.
  3. There is no kernel for float8: numbers are cast to it and back, and multiplied as floats.
  4. Where no product is one of integers and probabilities are not rounded, a plain Attention of rounded values is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.activations import FLOAT, ZERO_POINT, largest_magnitude, quantized
from ditq.export.lowering.attention import with_mask
from ditq.export.lowering.writer import MICROSOFT, Writer
from ditq.export.onnx_graph import DOMAIN, ROUNDED_ATTENTION
from ditq.export.targets import PlannedMatMul
from ditq.numerics.attention_rounding import FLOAT8, LARGEST, OVER, STEP_OF_P, AttentionFormat, rotation_of_heads
from ditq.numerics.uniform import SMALLEST_SCALE

ONE = np.float32(1)


def lower_rounded_attention(model: ir.Model) -> list[PlannedMatMul]:
    """Rewrite every ditq::RoundedAttention of the graph, in place, and say what its products are meant to run as."""
    writer, planned = Writer(model), []
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == ROUNDED_ATTENTION:
            lowering = _Lowering(writer, node)
            y, result = lowering.attention(), node.outputs[0]
            y.shape, y.type = result.shape, result.type
            result.replace_all_uses_with(y, replace_graph_outputs=True)
            writer.graph.remove(node, safe=True)
            planned += lowering.planned
    return planned


@dataclass(frozen=True, eq=False)
class _Rounded:
    """What is n s of a part: `numbers` n as uint8 with the zero point, or as floats; `step` s, None for 1 (not rounded)."""

    numbers: ir.Value
    step: ir.Value | None = None
    zero_point: int = ZERO_POINT


class _Lowering:
    def __init__(self, writer: Writer, node: ir.Node) -> None:
        self.writer, self.node = writer, node
        attributes = node.attributes
        self.site = attributes["site"].as_string()
        self.form = AttentionFormat(
            attributes["number"].as_string(),
            attributes["parts"].as_string(),
            bool(attributes["smooth_keys"].as_int()),
            tuple(attributes["scales"].as_floats()) if "scales" in attributes else (),
            bool(attributes["rotate"].as_int()),
        )
        self.scale = np.float32(attributes["scale"].as_float())
        self.mask = node.inputs[3] if len(node.inputs) > 3 else None
        self.holders: dict[str, ir.Value] = {}  # by part, what holds its n where agreement reads them
        self.planned: list[PlannedMatMul] = []
        writer.move(node, f"{self.site}/rounded")

    def attention(self) -> ir.Value:
        writer = self.writer
        query, key, value = self.node.inputs[:3]
        assert query is not None and key is not None and value is not None
        if self.form.turns:
            width = key.shape[-1] if key.shape is not None else None
            assert isinstance(width, int)
            matrix = writer.constant(rotation_of_heads(width).numpy(), name="rotation")
            query, key = (writer.op("MatMul", x, matrix, name="rotated") for x in (query, key))
        if self.form.smooth_keys and "k" in self.form.parts:
            tokens = writer.constant([-2], np.int64, name="axis")
            mean = writer.op("ReduceMean", key, tokens, name="mean_key", keepdims=1)
            key = writer.op("Sub", key, mean, name="smoothed_keys")
        q, k, v = self._rounded(query, "q"), self._rounded(key, "k"), self._rounded(value, "v")
        if "p" not in self.form.parts and not self.form.multiplies_integers("qk"):
            return self._plain(q, k, v)
        scores = self._scores(q, k)
        if self.mask is not None:
            scores = with_mask(writer, scores, self.mask)
        if "p" in self.form.parts:
            return self._values(scores, v)
        weights = writer.op("Softmax", scores, name="weights", axis=-1)
        y = writer.op("MatMul", weights, self._float(v, "v"), name="attention")
        output = self._output(y, v)
        self._plan("values", "dequantized", "vo", y, y)
        return output

    def _rounded(self, x: ir.Value, part: str) -> _Rounded:
        """A part [batch, heads, tokens, channels] with its scale, or as it is."""
        if part not in self.form.parts:
            return _Rounded(x)
        writer, number = self.writer, self.form.number
        static = self.form.static(part)
        if static is not None:
            step = writer.constant(static, np.float32, name=f"{part}.s")
            return _Rounded(self._nearest(writer.op("Div", x, step, name="in_steps"), part), step)
        largest = largest_magnitude(writer, x, OVER[part])
        step = writer.op("Div", largest, writer.constant(LARGEST[number], np.float32, name="largest"), name="step")
        step = writer.op(
            "Max", step, writer.constant(SMALLEST_SCALE, np.float32, name="smallest_scale"), name=f"{part}.s"
        )
        return _Rounded(self._nearest(writer.op("Div", x, step, name="in_steps"), part), step)

    def _output(self, y: ir.Value, v: _Rounded) -> ir.Value:
        """What is given where the output is rounded too, by the scale of the values."""
        if "o" not in self.form.parts:
            return y
        assert v.step is not None
        n = self._nearest(self.writer.op("Div", y, v.step, name="in_steps"), "o")
        return self._float(_Rounded(n, v.step), "o")

    def _nearest(self, steps: ir.Value, part: str) -> ir.Value:
        """x / s -> n; what is beyond the largest becomes that."""
        writer = self.writer
        if self.form.number == FLOAT8:
            eight = writer.op("Cast", steps, name=f"{part}.float8", to=ir.DataType.FLOAT8E4M3FN)
            n = writer.op("Cast", eight, name=f"{part}.n", to=FLOAT)
        else:
            n = quantized(writer, steps, ONE, ZERO_POINT)
        self.holders[part] = n
        return n

    def _float(self, rounded: _Rounded, part: str) -> ir.Value:
        """n s as floats."""
        writer, n = self.writer, rounded.numbers
        if rounded.step is None:
            return n
        if self.form.number != FLOAT8:
            zero = writer.constant(rounded.zero_point, np.uint8, name="zero_point")
            n = writer.op("DequantizeLinear", n, writer.constant(ONE, name="one"), zero, name=f"{part}.dequantized")
        return writer.op("Mul", n, rounded.step, name=f"{part}.rounded")

    def _plain(self, q: _Rounded, k: _Rounded, v: _Rounded) -> ir.Value:
        """Attention of rounded values, to be lowered as any other."""
        values = []
        for part, rounded, given in zip("qkv", (q, k, v), self.node.inputs, strict=False):
            value = self._float(rounded, part)
            assert given is not None
            value.shape, value.type = given.shape, given.type
            values.append(value)
        masks = [] if self.mask is None else [self.mask]
        y = self.writer.op("Attention", *values, *masks, name="attention", scale=float(self.scale))
        output = self._output(y, v)
        self._plan("attention", "dequantized", "qkvo", y, y)
        return output

    def _scores(self, q: _Rounded, k: _Rounded) -> ir.Value:
        """S [batch, heads, queries, tokens], without the mask."""
        writer = self.writer
        scale = writer.constant(self.scale, name="scale")
        if self.form.multiplies_integers("qk"):
            assert q.step is not None and k.step is not None
            product = self._integer_product(q, self._turned(k.numbers), ONE, self._turned(k.step), "scores")
            scores = writer.op("Mul", product, writer.op("Mul", q.step, scale, name="q.scale"), name="scaled_scores")
            self._plan("scores", "integer", "qk", product, scores)
            return scores
        queries = writer.op("Mul", self._float(q, "q"), scale, name="scaled")
        scores = writer.op("MatMul", queries, self._turned(self._float(k, "k")), name="scores")
        self._plan("scores", "dequantized", "qk", scores, scores)
        return scores

    def _values(self, scores: ir.Value, v: _Rounded) -> ir.Value:
        """exp(S - max S) rounded, times V, over the sum of the exponentials."""
        writer, last = self.writer, self.writer.constant([-1], np.int64, name="last_axis")
        largest = writer.op("ReduceMax", scores, last, name="largest_score", keepdims=1)
        p = writer.op("Exp", writer.op("Sub", scores, largest, name="below_largest"), name="p")
        total = writer.op("ReduceSum", p, last, name="p.sum", keepdims=1)
        step = np.float32(STEP_OF_P[self.form.number])
        s = writer.constant(step, name="p.s")
        if self.form.number == FLOAT8:
            n = self._nearest(writer.op("Div", p, s, name="in_steps"), "p")
        else:
            n = self.holders["p"] = quantized(writer, p, step, 0)
        kind: Literal["integer", "dequantized"] = "dequantized"
        if self.form.multiplies_integers("pv"):
            assert v.step is not None
            kind, product = "integer", self._integer_product(_Rounded(n, None, 0), v.numbers, step, v.step, "values")
        else:
            product = writer.op("MatMul", self._float(_Rounded(n, s, 0), "p"), self._float(v, "v"), name="values")
        y = writer.op("Div", product, total, name="attention")
        output = self._output(y, v)
        self._plan("values", kind, "pvo", product, y)
        return output

    def _turned(self, x: ir.Value) -> ir.Value:
        """[batch, heads, a, b] -> [batch, heads, b, a]."""
        return self.writer.op("Transpose", x, name="turned", perm=[0, 1, 3, 2])

    def _integer_product(
        self, left: _Rounded, right: ir.Value, left_step: np.float32, right_step: ir.Value, name: str
    ) -> ir.Value:
        """n_left n_right, times a constant scale and one a column [batch, heads, 1, columns]."""
        writer = self.writer
        zeros = [writer.constant(zero, np.uint8, name="zero_point") for zero in (left.zero_point, ZERO_POINT)]
        step = writer.constant(left_step, name="one")
        inputs = (left.numbers, right, step, right_step, *zeros)
        return writer.op("MatMulIntegerToFloat", *inputs, name=name, domain=MICROSOFT)

    def _plan(
        self, name: str, kind: Literal["integer", "dequantized"], parts: str, product: ir.Value, output: ir.Value
    ) -> None:
        holders = {f"{self.site}/{part}": self.holders[part].name or "" for part in parts if part in self.holders}
        given = self.node.inputs[0]
        assert given is not None and given.name is not None and product.name is not None and output.name is not None
        if holders:
            site = f"{self.site}/{name}"
            self.planned.append(PlannedMatMul(site, kind, given.name, product.name, output.name, numbers=holders))
