"""FP4 in TensorRT's own operators, in the place of the functions of `lowering/four_bit.py`.

FP4Input(x, s)         TRT_FP4DynamicQuantize(x, s) -> FP4 numbers, FP8 block scales; DequantizeLinear of both
FP4Weight(n, b, s)     DequantizeLinear(FP4 constant, DequantizeLinear(FP8 constant, s))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from ditq.export.lowering.four_bit import DOMAIN, INPUT
from ditq.numerics.carrier import BLOCK

TENSORRT = "trt"
Array = np.ndarray[Any, Any]


def is_fp4(node: onnx.NodeProto) -> bool:
    """Whether the node calls one of the functions."""
    return bool(node.domain == DOMAIN)


def in_own_operators(model: onnx.ModelProto, weight: Callable[[str], Array]) -> list[onnx.TensorProto]:
    """Write TensorRT's operators in the place of the functions, in place; weight: by name, FP4 numbers [O, I] in float32.

    Returns:
        The FP4 constants, two numbers a byte.
    """
    calls = [node for node in model.graph.node if is_fp4(node)]
    if not calls:
        return []
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if not is_fp4(node):
            nodes.append(node)
        elif node.op_type == INPUT:
            nodes += _input(node)
        else:
            constants.append(_packed(f"{node.output[0]}/fp4", weight(node.input[0])))
            nodes += _weight(node, constants[-1].name)
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend([*kept, helper.make_opsetid(TENSORRT, 1)])
    return constants


def _input(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    (x, scale), y = node.input, node.output[0]
    settings: dict[str, Any] = {"axis": -1, "block_size": BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
    return [
        helper.make_node(
            "TRT_FP4DynamicQuantize", [x, scale], [f"{y}/fp4", f"{y}/fp8"], f"{y}/fp4", domain=TENSORRT, **settings
        ),
        helper.make_node("DequantizeLinear", [f"{y}/fp8", scale], [f"{y}/blocks"], f"{y}/blocks"),
        helper.make_node("DequantizeLinear", [f"{y}/fp4", f"{y}/blocks"], [y], y, axis=-1, block_size=BLOCK),
    ]


def _weight(node: onnx.NodeProto, numbers: str) -> list[onnx.NodeProto]:
    (_, blocks, scale), y = node.input, node.output[0]
    return [
        helper.make_node("DequantizeLinear", [blocks, scale], [f"{y}/blocks"], f"{y}/blocks"),
        helper.make_node("DequantizeLinear", [numbers, f"{y}/blocks"], [y], y, axis=1, block_size=BLOCK),
    ]


def _packed(name: str, numbers: Array) -> onnx.TensorProto:
    """The first of two numbers in the low half of a byte; there are a multiple of 16."""
    bits = numbers.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(-1) & 15
    raw = (bits[::2] | bits[1::2] << 4).tobytes()
    return helper.make_tensor(name, TensorProto.FLOAT4E2M1, numbers.shape, raw, raw=True)
