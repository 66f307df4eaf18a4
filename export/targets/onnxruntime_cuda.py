"""ONNX Runtime on NVIDIA GPUs: products of int8 numbers, weights in 4 and 8 bits, the rest in float16 and float32.

Only operators that its CUDA provider has kernels of (docs/onnxruntime-cuda.md); sessions are opened by `export/providers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from ditq.errors import DitqError
from ditq.export.fusion_report import FusionReport
from ditq.export.lowering import block_weights, eight_bit
from ditq.export.lowering.attention import lower_attention
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

NAME = "onnxruntime-cuda"
_LARGEST = 127  # of int8, which the integer product reads on both sides


def lower(model: ir.Model, layers: Mapping[str, QuantLinear]) -> list[PlannedMatMul]:
    """Replace every ditq::QuantLinear and TokenAttention of the graph by what it stands for, and multiply the rest in half
    precision, in place. Linear attention stays in float32: its sums go over all tokens."""
    sums = lower_token_attentions(model).get("linear_attention", set())
    lower_attention(model)
    writer = Writer(model)
    lowering = GpuLayers(writer, eight_bit.INTEGERS, block_weights, check)
    planned = lower_layers(writer, layers, lowering.made)
    multiply_in_half(writer, lowering.matmuls | sums)
    return planned


def check(layer: QuantLinear) -> None:
    """Raise DitqError for inputs that have no form here."""
    form = layer.activation
    carrier = form.grid if form.grid in (FLOAT8.name, FLOAT4.name) else INT8.name
    TARGET.check_product(layer.site, carrier, form.bits)
    if form.grid == "unsigned" and form.maximum > _LARGEST:
        raise DitqError(
            f"{layer.site}: {NAME} multiplies int8, which holds no unsigned inputs of {form.bits} bits; leave "
            "activation_unsigned out, or set 7 bits or fewer"
        )


def available() -> tuple[bool, str]:
    """Whether ONNX Runtime has a CUDA provider here that loads, and a GPU for it."""
    from ditq.export.providers import available as here

    return here.available()


def runner(engine: Engine, options: RunOptions = USUAL) -> Runner:
    """Runs the engine's graphs on the GPU (`export/providers/run.py`); what they are given stays there."""
    from ditq.export.providers import run

    return run.runner(engine, options)


def prove(engine: Engine) -> dict[str, FusionReport]:
    """What the session that runs the engine multiplies on the GPU, or, without one, would (`export/providers/proof.py`)."""
    from ditq.export.providers import proof

    return proof.prove(engine)


TARGET = register(
    Target(
        NAME,
        "ONNX Runtime on an NVIDIA GPU, by its CUDA or TensorRT providers",
        available,
        lower,
        runner,
        prove=prove,
        half=True,
        device="cuda",
        dtype=torch.bfloat16,
    )
)
