"""The same transformer unquantized, as an ONNX file of its own: what an engine's speed and size are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from ditq.errors import DitqError
from ditq.export.lowering.attention import lower_attention
from ditq.export.onnx_graph import Axes, export_what_varies
from ditq.nn import QuantLinear


def float_onnx(model: nn.Module, inputs: Mapping[str, Any], axes: Axes, path: str | Path) -> Path:
    """Write `model` in float32 to `path` (weights beside it, `<name>.data`), with the attention form of the engines.

    Raises:
        DitqError: the model is quantized, or cannot be exported.
    """
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise DitqError("a baseline is made of the unquantized model, but this one holds quantized layers")
    graph, _ = export_what_varies(model, inputs, axes)
    lower_attention(graph)
    path = Path(path)
    ir.save(graph, path, external_data=f"{path.name}.data")
    return path
