"""ONNX Runtime on the CPU: int8 carriers and uint8 activations, which its optimizer fuses into integer matmuls.

The forms are those that were measured to fuse (docs/engine.md); `export/fusion.py` proves it for each engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.fusion_report import FusionReport
from ditq.export.lowering import activations, low_rank, weights
from ditq.export.lowering.attention import lower_attention
from ditq.export.lowering.groups import Group, summed_products
from ditq.export.lowering.layers import Made, choose_rows, lower_layers
from ditq.export.lowering.rounded_attention import lower_rounded_attention
from ditq.export.lowering.token_attentions import lower_token_attentions
from ditq.export.lowering.writer import Writer
from ditq.export.targets import USUAL, PlannedMatMul, Runner, RunOptions, Target, register
from ditq.export.text_cache import TextCache
from ditq.nn import ActivationFormat, QuantLinear
from ditq.nn.call_timestep import ARGUMENT
from ditq.numerics.carrier import FLOAT8

if TYPE_CHECKING:
    from ditq.export.engine import Engine


def lower(model: ir.Model, layers: Mapping[str, QuantLinear]) -> list[PlannedMatMul]:
    """Replace every ditq::QuantLinear, RoundedAttention and TokenAttention of the graph by what it stands for, in place.

    Layers that read the same value through the same transform share it, and share its quantized form.
    """
    lower_token_attentions(model)
    planned = lower_rounded_attention(model)
    lower_attention(model)
    writer = Writer(model)
    return planned + lower_layers(writer, layers, _Lowering(writer).made, rows_last=True)


@dataclass
class _Lowering:
    writer: Writer
    quantized: dict[tuple[ir.Value, ActivationFormat, tuple[float, ...]], tuple[ir.Value, ir.Value]] = field(
        default_factory=dict
    )
    chosen: dict[tuple[ir.Value, ActivationFormat, ir.Value], tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    grouped: dict[tuple[ir.Value, ActivationFormat], list[Group]] = field(default_factory=dict)
    static: dict[tuple[ir.Value, float, ActivationFormat], ir.Value] = field(default_factory=dict)

    def made(self, x: ir.Value, rank: int, layer: QuantLinear, rows: ir.Value | None) -> Made:
        """All that the layer makes of the transformed input, or of those rows of it."""
        writer = self.writer
        if layer.activation.grid == FLOAT8.name:
            TARGET.check_product(layer.site, FLOAT8.name, layer.activation.bits)
        if layer.activation.granularity in ("token", "timestep"):
            integers, scale = self._unit_scale(x, layer)
            if rows is not None:
                integers, scale = self._rows(x, integers, scale, rows, layer)
            product, inner = self._integer_products(integers, layer)
            y = writer.op("Mul", product, scale, name="rescaled")
            scaled = None if inner is None else writer.op("Mul", inner, scale, name="inner.rescaled")
            return Made("integer", product, self._finished(y, scaled, x, rank, layer), inner)
        if layer.activation.granularity == "group":
            key = (x, layer.activation)
            if key not in self.grouped:
                self.grouped[key] = activations.per_group(writer, x, rank, layer.in_features, layer.activation)
            made = summed_products(writer, self.grouped[key], layer)
            y = self._finished(made.total, made.inner, x, rank, layer)
            return Made("integer", made.total, y, groups=made.products)
        if layer.activation.granularity == "tensor":
            return self._static_product(x, rank, layer)
        if weights.has_block_kernel(layer):
            product = weights.block_matmul(writer, x, layer)
            inner = low_rank.float_inner(writer, x, layer) if layer.rank else None
            return Made("weight-only kernel", product, self._finished(product, inner, x, rank, layer))
        product = writer.op("MatMul", x, weights.float_weight(writer, layer), name="matmul")
        return Made("dequantized", product, self._finished(product, None, x, rank, layer))

    def _unit_scale(self, x: ir.Value, layer: QuantLinear) -> tuple[ir.Value, ir.Value]:
        """(integers, what one of them stands for), made once for all layers of one input and format."""
        writer, form, calibrated = self.writer, layer.activation, layer.activation_scale
        key = (x, form, () if calibrated is None else tuple(calibrated.tolist()))
        if key not in self.quantized:
            if calibrated is None:
                self.quantized[key] = activations.per_token(writer, x, form)
            else:
                scale = writer.state(f"{layer.site}.activation_scale", calibrated)
                self.quantized[key] = activations.per_timestep(writer, x, scale, form)
        return self.quantized[key]

    def _rows(
        self, x: ir.Value, integers: ir.Value, scale: ir.Value, rows: ir.Value, layer: QuantLinear
    ) -> tuple[ir.Value, ir.Value]:
        """The same of some rows of x: bytes are moved, not floats."""
        key = (x, layer.activation, rows)
        if key not in self.chosen:
            writer, dequantize = self.writer, integers.producer()
            assert dequantize is not None
            q, *others = dequantize.inputs
            assert q is not None
            some = choose_rows(writer, q, layer.in_features, rows)
            integers = writer.op("DequantizeLinear", some, *others, name="dequantized")
            self.chosen[key] = integers, choose_rows(writer, scale, 1, rows)
        return self.chosen[key]

    def _static_product(self, x: ir.Value, rank: int, layer: QuantLinear) -> Made:
        writer, scale = self.writer, layer.activation_scale
        assert scale is not None
        key = (x, scale.item(), layer.activation)
        batch = writer.constant([0], np.int64, name="axis")
        if key not in self.static:
            # A product of two matrices and a bias would become a Gemm, computed in float; three dimensions do not.
            deep = writer.op("Unsqueeze", x, batch, name="batch_of_one") if rank == 2 else x
            self.static[key] = activations.per_tensor(writer, deep, scale, layer.activation)
        product, inner = self._integer_products(self.static[key], layer)
        y, flat = product, inner
        if rank == 2:
            y = writer.op("Squeeze", product, batch, name="one_batch")
            flat = None if inner is None else writer.op("Squeeze", inner, batch, name="inner.one_batch")
        return Made("integer", product, self._finished(y, flat, x, rank, layer), inner)

    def _integer_products(self, integers: ir.Value, layer: QuantLinear) -> tuple[ir.Value, ir.Value | None]:
        """(the product with the codes, the one with the rows of a branch that reads integers)."""
        product = self.writer.op("MatMul", integers, weights.integer_weight(self.writer, layer), name="matmul")
        reads = low_rank.reads_integers(layer)
        return product, low_rank.integer_inner(self.writer, integers, layer) if reads else None

    def _finished(self, y: ir.Value, inner: ir.Value | None, x: ir.Value, rank: int, layer: QuantLinear) -> ir.Value:
        """y with the branch, whose inner values are given or made of x, and the bias."""
        if low_rank.reads_float(layer):
            inner = low_rank.float_inner(self.writer, x, layer)
        if inner is not None:
            return low_rank.add_branch(self.writer, y, inner, rank, layer)
        if layer.bias is None:
            return y
        return self.writer.op("Add", y, self.writer.state(f"{layer.site}.bias", layer.bias), name="biased")


def available() -> tuple[bool, str]:
    """Whether ONNX Runtime can be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        return False, f"onnxruntime cannot be imported ({error}); pip install onnxruntime"
    return True, f"onnxruntime {onnxruntime.__version__}"


def runner(engine: Engine, options: RunOptions = USUAL) -> Runner:
    """Runs the engine's graph in one session; the graph of the text, if there is one, in another and once for a text."""
    from ditq.export.session import RUNTIME_ERRORS, first_line, open_session, session_options

    sessions = {graph: open_session(engine.folder / graph, session_options(options.threads)) for graph in engine.graphs}
    readers = {graph: [item.name for item in session.get_inputs()] for graph, session in sessions.items()}

    def run_graph(graph: str, arrays: Mapping[str, Any]) -> list[Any]:
        try:
            return list(sessions[graph].run(None, {name: arrays[name] for name in readers[graph]}))
        except RUNTIME_ERRORS as error:
            raise DitqError(f"{engine.folder}: ONNX Runtime cannot run these inputs: {first_line(error)}") from error

    names = {} if engine.text is None else engine.text

    def of_text(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return dict(zip(names["outputs"], run_graph(engine.graphs[-1], arrays), strict=True))

    texts = TextCache(of_text)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        made = texts({name: inputs[name] for name in names["inputs"]}) if names else {}
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(run_graph(engine.graph_at(inputs.get(ARGUMENT)), arrays | made)[0])

    return run


def prove(engine: Engine) -> dict[str, FusionReport]:
    """What the session that runs the engine multiplies (`export/fusion.py`)."""
    from ditq.export.fusion import prove_fusion

    return {"": prove_fusion(engine)}


def shares(engine: Engine, inputs: Mapping[str, Tensor], threads: int | None = None) -> Mapping[str, float]:
    """Where the time of a call goes, by the runtime's own profile."""
    from ditq.export.time_shares import of_session

    return of_session(engine, inputs, threads)


TARGET = register(
    Target(
        "onnxruntime-cpu",
        "ONNX Runtime on the CPU, integer matmuls",
        available,
        lower,
        runner,
        prove=prove,
        shares=shares,
    )
)
