"""Which of ONNX Runtime's providers for NVIDIA GPUs runs an engine, with which options, and why not one before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx

from ditq.export.engine import Engine

CUDA, TENSORRT, RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
NAMES = {RTX: "TensorRT for RTX", TENSORRT: "TensorRT", CUDA: "CUDA"}  # in the order in which they are tried
_NOT_TENSORRTS = ("MatMulInteger",)  # standard operators that TensorRT's parser does not know


@dataclass(frozen=True)
class Choice:
    """The provider, and of each that was to be tried before it, why it was not taken."""

    provider: str
    passed_over: Mapping[str, str]

    def __str__(self) -> str:
        others = "".join(f"; {NAMES[name]}: {why}" for name, why in self.passed_over.items())
        return f"by ONNX Runtime's {NAMES[self.provider]} provider{others}"


def choose(there: Collection[str], foreign: Sequence[str]) -> Choice:
    """The first provider of those that are `there` that takes a graph with these operators that TensorRT does not know."""
    passed_over: dict[str, str] = {}
    for name in (RTX, TENSORRT):
        if foreign:
            passed_over[name] = f"does not know {', '.join(foreign)}"
        elif name not in there:
            passed_over[name] = "not in this onnxruntime"
        else:
            return Choice(name, passed_over)
    return Choice(CUDA, passed_over)


def foreign_operators(engine: Engine) -> list[str]:
    """Operators of the engine's graphs that no TensorRT takes: a session would go back and forth between two providers."""
    graphs = (onnx.load(str(engine.folder / name), load_external_data=False).graph for name in engine.graphs)
    nodes = (node for graph in graphs for node in graph.node)
    return sorted({node.op_type for node in nodes if node.domain or node.op_type in _NOT_TENSORRTS})
