"""ONNX Runtime on the CPU: int8 carriers and uint8 activations, which its optimizer fuses into integer matmuls.

The forms are those that were measured to fuse (docs/targets.md); `export/fusion.py` proves it for each engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.lowering import activations, weights
from ditq.export.lowering.attention import lower_attention
from ditq.export.lowering.transforms import apply_transform, fingerprint
from ditq.export.lowering.writer import Writer
from ditq.export.onnx_graph import DOMAIN
from ditq.export.targets import Kind, PlannedMatMul, Runner, Target, register
from ditq.nn import QuantLinear

if TYPE_CHECKING:
    from ditq.export.engine import Engine


def lower(model: ir.Model, layers: Mapping[str, QuantLinear]) -> list[PlannedMatMul]:
    """Replace every ditq::QuantLinear of the graph by the operators that it stands for, in place.

    Layers that read the same value through the same transform share it, and share its quantized form.
    """
    lowering = _Lowering(Writer(model))
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == "QuantLinear":
            lowering.replace(node, layers[node.attributes["site"].as_string()])
    model.graph.opset_imports.pop(DOMAIN, None)
    lower_attention(model)
    return lowering.planned


@dataclass
class _Lowering:
    writer: Writer
    planned: list[PlannedMatMul] = field(default_factory=list)
    transformed: dict[tuple[ir.Value, str], ir.Value] = field(default_factory=dict)
    quantized: dict[tuple[ir.Value, int], tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def replace(self, node: ir.Node, layer: QuantLinear) -> None:
        writer = self.writer
        writer.move(node, layer.site)
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        rank = len(x.shape)
        key = (x, fingerprint(layer.transform))
        if key not in self.transformed:
            self.transformed[key] = apply_transform(writer, x, rank, layer.transform)
        y = self._product(self.transformed[key], rank, layer)
        if layer.bias is not None:
            y = writer.op("Add", y, writer.state(f"{layer.site}.bias", layer.bias), name="biased")
        result = node.outputs[0]
        y.shape, y.type = result.shape, result.type
        result.replace_all_uses_with(y, replace_graph_outputs=True)
        if y.is_graph_output():
            y.name = result.name
        writer.graph.remove(node, safe=True)

    def _product(self, x: ir.Value, rank: int, layer: QuantLinear) -> ir.Value:
        """x' W^T without the bias."""
        writer = self.writer
        if layer.activation.granularity == "token":
            token_key = (x, layer.activation.bits)
            if token_key not in self.quantized:
                self.quantized[token_key] = activations.per_token(writer, x, layer.activation.bits)
            integers, scale = self.quantized[token_key]
            y = self._planned(layer, "integer", writer.op("MatMul", integers, weights.integer_weight(writer, layer), name="matmul"))
            return writer.op("Mul", y, scale, name="rescaled")
        if layer.activation.granularity == "tensor":
            return self._static_product(x, rank, layer)
        if weights.has_block_kernel(layer):
            return self._planned(layer, "weight-only kernel", weights.block_matmul(writer, x, layer))
        y = writer.op("MatMul", x, weights.float_weight(writer, layer), name="matmul")
        return self._planned(layer, "dequantized", y)

    def _static_product(self, x: ir.Value, rank: int, layer: QuantLinear) -> ir.Value:
        writer, scale = self.writer, layer.activation_scale
        assert scale is not None
        # A product of two matrices and a bias would become a Gemm, which is computed in float; three dimensions do not.
        batch = writer.constant([0], np.int64, name="axis")
        if rank == 2:
            x = writer.op("Unsqueeze", x, batch, name="batch_of_one")
        integers = activations.per_tensor(writer, x, scale, layer.activation.bits)
        y = self._planned(layer, "integer", writer.op("MatMul", integers, weights.integer_weight(writer, layer), name="matmul"))
        return writer.op("Squeeze", y, batch, name="one_batch") if rank == 2 else y

    def _planned(self, layer: QuantLinear, kind: Kind, product: ir.Value) -> ir.Value:
        assert product.name is not None
        self.planned.append(PlannedMatMul(layer.site, kind, product.name))
        return product


def available() -> tuple[bool, str]:
    """Whether ONNX Runtime can be imported."""
    try:
        import onnxruntime
    except ImportError as error:
        return False, f"onnxruntime cannot be imported ({error}); pip install onnxruntime"
    return True, f"onnxruntime {onnxruntime.__version__}"


def runner(engine: Engine, threads: int | None = None) -> Runner:
    """Runs the engine's graph in one session."""
    from ditq.export.session import RUNTIME_ERRORS, first_line, open_session, session_options

    session = open_session(engine.folder / "model.onnx", session_options(threads))

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
        except RUNTIME_ERRORS as error:
            raise DitqError(f"{engine.folder}: ONNX Runtime cannot run these inputs: {first_line(error)}") from error

    return run


TARGET = register(Target("onnxruntime-cpu", "ONNX Runtime on the CPU, integer matmuls", available, lower, runner))
