"""Runs an engine's graphs on this machine's GPU by ONNX Runtime, on torch's tensors and in the order of torch's stream."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.engine import TEXT_GRAPH, Engine
from ditq.export.providers import rtx
from ditq.export.providers.bound import BoundSession
from ditq.export.providers.choice import CUDA, NAMES, RTX, Choice, choose, foreign_operators
from ditq.export.providers.options import options_of
from ditq.export.session import RUNTIME_ERRORS, first_line, session_options
from ditq.export.targets import USUAL, Runner, RunOptions
from ditq.export.text_cache import TextCache
from ditq.nn.call_timestep import ARGUMENT


def runner(engine: Engine, options: RunOptions = USUAL) -> Runner:
    """Runs the engine's graphs; that of the text, if there is one, once for a text.

    Which provider runs it, and why not one before it, is said on standard error.

    Raises:
        DitqError: the provider does not load, or does not take a graph.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    choice = choice_of(engine)
    print(f"note: {engine.name} is run {choice}, on {torch.cuda.get_device_name(device)}", file=sys.stderr)
    stream = torch.cuda.Stream(device)
    graphs = {
        graph: BoundSession(open_on_gpu(engine, graph, choice, stream.cuda_stream, options.threads), device)
        for graph in engine.graphs
    }
    call = calls(engine, graphs)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        caller = torch.cuda.current_stream(device)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            y = call(inputs)
        caller.wait_stream(stream)
        for tensor in inputs.values():  # their memory must not be given away before the graph has read it,
            tensor.record_stream(stream)
        y.record_stream(caller)  # nor that of the output before the caller has
        return y

    return run


def calls(engine: Engine, graphs: Mapping[str, BoundSession]) -> Runner:
    """The engine's output of its inputs, by sessions of its graphs."""
    names = {} if engine.text is None else engine.text
    texts = TextCache(graphs[TEXT_GRAPH]) if names else None

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        try:
            made = {} if texts is None else texts({name: inputs[name] for name in names["inputs"]})
            return graphs[engine.graph_at(inputs.get(ARGUMENT))]({**inputs, **made})[engine.manifest["output"]]
        except (RuntimeError, *RUNTIME_ERRORS) as error:  # the former of a bound call
            raise failure(engine, error) from error

    return run


def choice_of(engine: Engine) -> Choice:
    """Which provider is to run the engine here."""
    import onnxruntime

    foreign = foreign_operators(engine)
    there = set(onnxruntime.get_available_providers())
    return choose(there if foreign or not rtx.devices() else there | {RTX}, foreign)


def open_on_gpu(engine: Engine, graph: str, choice: Choice, stream: int, threads: int | None) -> Any:
    """A session of one of the engine's graphs on the GPU, in the order of a CUDA stream.

    Raises:
        DitqError: the provider does not load (ONNX Runtime would go on without it), or does not take the graph.
    """
    return opened(engine, graph, provider_list(engine, graph, choice, stream), threads)


def provider_list(engine: Engine, graph: str, choice: Choice, stream: int) -> list[tuple[str, dict[str, str]]]:
    """The chosen provider, and CUDA behind TensorRT's for operators that it leaves; shapes are computed on the CPU."""
    wanted = (RTX,) if choice.provider == RTX else tuple(dict.fromkeys((choice.provider, CUDA)))
    gpu = [(name, options_of(name, engine, graph, stream)) for name in wanted]
    return [*gpu, ("CPUExecutionProvider", {})]


def opened(engine: Engine, graph: str, providers: list[tuple[str, dict[str, str]]], threads: int | None) -> Any:
    """A session of one of the engine's graphs with just these providers."""
    import onnxruntime

    options = session_options(threads)
    options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")  # few-bit weights are not expanded for many tokens
    options.add_session_config_entry(
        "session.use_device_allocator_for_initializers", "1"
    )  # frees what it laid out anew
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path, (first, settings) = engine.folder / graph, providers[0]
    given: dict[str, Any] = {"providers": providers}
    if first == RTX:
        options.add_provider_for_devices([rtx.devices()[int(settings["device_id"])]], settings)
        given = {}
    try:
        # Without its own fallback: that would go on with the CPU after an error.
        session = onnxruntime.InferenceSession(str(path), options, enable_fallback=0, **given)
    except RUNTIME_ERRORS as error:
        raise failure(engine, error, path) from error
    missing = next((name for name, _ in providers if name not in session.get_providers()), None)
    if missing is not None:
        raise DitqError(
            f"{engine.name}: ONNX Runtime's {NAMES[missing]} provider does not load here; see what `ditq doctor` says of it"
        )
    return session


def failure(engine: Engine, error: BaseException, path: Path | None = None) -> DitqError:
    """What ONNX Runtime says, in one line; of memory, what there is."""
    said = str(error)
    if any(word in said for word in ("out of memory", "Failed to allocate memory", "CUDA_ERROR_OUT_OF_MEMORY")):
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        return DitqError(
            f"{engine.name}: does not fit in the GPU's memory ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free); close what "
            "else uses it, or ask for smaller or fewer pictures at once"
        )
    what = "ONNX Runtime cannot run these inputs" if path is None else "ONNX Runtime does not take it"
    return DitqError(f"{path or engine.folder}: {what}: {first_line(error)}")
