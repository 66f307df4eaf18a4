"""ONNX Runtime sessions as every engine runs them, and its errors as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ditq.errors import DitqError

RUNTIME_ERRORS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # for a graph that is given as bytes


def session_options(threads: int | None = None) -> Any:
    """Options with every graph optimization on and integer products exact on every CPU."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what goes wrong arrives as an exception
    if threads is not None:
        options.intra_op_num_threads = threads
    # An x86 CPU without VNNI adds pairs of u8*s8 products in 16 bits and saturates: silently wrong by several percent.
    # With this, a weight that goes beyond +-64 takes the exact, slower u8*u8 kernel there; elsewhere nothing changes.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # A weight of 4 or 8 bits in front of a float product must not round the other side to 8 bits as well, which is the default.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_session(graph: Path | bytes, options: Any) -> Any:
    """A session on the CPU, of a graph on disk or in memory.

    Raises:
        DitqError: ONNX Runtime does not take the graph.
    """
    try:
        model = graph if isinstance(graph, bytes) else str(graph)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        name = "the graph" if isinstance(graph, bytes) else graph
        raise DitqError(f"{name}: ONNX Runtime does not take it: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
