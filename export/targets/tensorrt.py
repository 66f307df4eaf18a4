"""TensorRT on NVIDIA GPUs: 8-bit products, few-bit weights, the rest in float16 and float32, all types written in the graph.

One target for the two libraries, TensorRT and TensorRT for RTX. Plans are built and kept by `export/plans`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from ditq.export.fusion_report import FusionReport
from ditq.export.lowering import eight_bit, few_bit_weights, low_rank, weights
from ditq.export.lowering.half import multiply_in_half
from ditq.export.lowering.layers import Made, lower_layers
from ditq.export.lowering.writer import Writer
from ditq.export.targets import Kind, PlannedMatMul, Runner, Target, register
from ditq.nn import ActivationFormat, QuantLinear
from ditq.numerics.carrier import FLOAT8, INT8

if TYPE_CHECKING:
    from ditq.export.engine import Engine

NAME = "tensorrt"
_DEQUANTIZED: Kind = "dequantized"
_WEIGHT_ONLY: Kind = "weight-only kernel"


def lower(model: ir.Model, layers: Mapping[str, QuantLinear]) -> list[PlannedMatMul]:
    """Replace every ditq::QuantLinear of the graph by what it stands for, and multiply the rest in half precision, in place."""
    writer = Writer(model)
    lowering = _Lowering(writer)
    planned = lower_layers(writer, layers, lowering.made)
    multiply_in_half(writer, lowering.matmuls)
    return planned


@dataclass
class _Lowering:
    writer: Writer
    numbers: dict[tuple[ir.Value, ActivationFormat, tuple[float, ...]], eight_bit.Numbers] = field(default_factory=dict)
    matmuls: set[ir.Value] = field(default_factory=set)

    def made(self, x: ir.Value, rank: int, layer: QuantLinear, rows: ir.Value | None) -> Made:
        """All that the layer makes of the transformed input; rows are chosen in front of it here."""
        assert rows is None
        if layer.activation.granularity != "none":
            return self._eight_bit(x, rank, layer)
        writer, kind, inner = self.writer, _DEQUANTIZED, None
        if few_bit_weights.has_form(layer):
            kind, product = _WEIGHT_ONLY, few_bit_weights.multiplied(writer, x, layer)
            inner = low_rank.float_inner(writer, x, layer) if layer.rank else None
        else:
            product = writer.op("MatMul", x, weights.float_weight(writer, layer), name="matmul")
        return Made(kind, product, self._finished(product, inner, x, layer))

    def _eight_bit(self, x: ir.Value, rank: int, layer: QuantLinear) -> Made:
        eight_bit.check(layer, NAME)
        calibrated = layer.activation_scale
        key = (x, layer.activation, () if calibrated is None else tuple(calibrated.reshape(-1).tolist()))
        if key not in self.numbers:  # once for all layers of one input and format
            self.numbers[key] = eight_bit.quantized(self.writer, x, rank, layer)
        product = eight_bit.multiplied(self.writer, self.numbers[key], x, rank, layer)
        self.matmuls |= {product.matmul} if product.inner_matmul is None else {product.matmul, product.inner_matmul}
        kind: Kind = "float8" if layer.activation.grid == FLOAT8.name else "integer"
        y = self._finished(product.total, product.inner, x, layer)
        return Made(kind, product.matmul, y, product.inner_matmul)

    def _finished(self, y: ir.Value, inner: ir.Value | None, x: ir.Value, layer: QuantLinear) -> ir.Value:
        """y with the branch, whose inner values are given or made of x, and the bias."""
        if low_rank.reads_float(layer):
            inner = low_rank.float_inner(self.writer, x, layer)
        if inner is not None:
            y = low_rank.with_branch(self.writer, y, inner, layer)
        if layer.bias is None:
            return y
        return self.writer.op("Add", y, self.writer.state(f"{layer.site}.bias", layer.bias), name="biased")


def available() -> tuple[bool, str]:
    """Whether there is a TensorRT and a GPU that it can use."""
    from ditq.export.plans import run

    return run.available()


def runner(engine: Engine, threads: int | None = None) -> Runner:
    """Runs the engine's plan for this machine's GPU (`export/plans/run.py`)."""
    from ditq.export.plans import run

    return run.runner(engine, threads)


def prove(engine: Engine) -> dict[str, FusionReport]:
    """Of each plan, what it multiplies (`export/plans/proof.py`)."""
    from ditq.export.plans import proof

    return proof.prove(engine)


TARGET = register(
    Target(
        NAME,
        "TensorRT or TensorRT for RTX on an NVIDIA GPU",
        available,
        lower,
        runner,
        carriers=(INT8.name, FLOAT8.name),
        prove=prove,
        plans=True,
        half=True,
        device="cuda",
        dtype=torch.bfloat16,
    )
)
