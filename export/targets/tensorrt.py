"""TensorRT on NVIDIA GPUs: 8-bit and FP4 products, few-bit weights, the rest in float16 and float32, all types in the graph.

One target for the two libraries, TensorRT and TensorRT for RTX. Plans are built and kept by `export/plans`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from ditq.errors import DitqError
from ditq.export.fusion_report import FusionReport
from ditq.export.lowering import eight_bit, few_bit_weights
from ditq.export.lowering.gpu_layers import GpuLayers
from ditq.export.lowering.half import multiply_in_half
from ditq.export.lowering.layers import lower_layers
from ditq.export.lowering.token_attentions import lower_token_attentions
from ditq.export.lowering.writer import Writer
from ditq.export.targets import USUAL, PlannedMatMul, Runner, RunOptions, Target, register
from ditq.nn import QuantLinear
from ditq.numerics.carrier import FLOAT4, FLOAT8, INT8

if TYPE_CHECKING:
    from ditq.export.engine import Engine

NAME = "tensorrt"


def lower(model: ir.Model, layers: Mapping[str, QuantLinear]) -> list[PlannedMatMul]:
    """Replace every ditq::QuantLinear and TokenAttention of the graph by what it stands for, and multiply the rest in half
    precision, in place. Linear attention stays in float32: its sums go over all tokens."""
    sums = lower_token_attentions(model).get("linear_attention", set())
    writer = Writer(model)
    lowering = GpuLayers(writer, eight_bit.DEQUANTIZED, few_bit_weights, check)
    planned = lower_layers(writer, layers, lowering.made)
    multiply_in_half(writer, lowering.matmuls | sums)
    return planned


def check(layer: QuantLinear) -> None:
    """Raise DitqError for inputs that have no form here."""
    if layer.activation.grid == "unsigned":
        raise DitqError(f"{layer.site}: {NAME} has no unsigned inputs; leave activation_unsigned out")


def available() -> tuple[bool, str]:
    """Whether there is a TensorRT and a GPU that it can use."""
    from ditq.export.plans import run

    return run.available()


def runner(engine: Engine, options: RunOptions = USUAL) -> Runner:
    """Runs the engine's plan for this machine's GPU (`export/plans/run.py`)."""
    from ditq.export.plans import run

    return run.runner(engine, options)


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
        carriers=(INT8.name, FLOAT8.name, FLOAT4.name),
        prove=prove,
        plans=True,
        half=True,
        device="cuda",
        dtype=torch.bfloat16,
    )
)
