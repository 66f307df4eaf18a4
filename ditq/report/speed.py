"""How long a denoiser call takes: the engine beside its original, in turns, on the device that the engine runs on."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq.calibration.batches import moved
from ditq.calibration.sampling import DenoiserCall, SamplingSettings, sample
from ditq.checkpoint import Checkpoint
from ditq.devices import FILLED
from ditq.export import time_shares
from ditq.export.arguments import flatten
from ditq.export.baseline import float_onnx
from ditq.export.engine import Engine
from ditq.export.loader import EngineTransformer, engine_inputs, load_engine, only_picture
from ditq.export.session import open_session, session_options
from ditq.export.targets import target
from ditq.inspection import example_inputs
from ditq.memory import free_memory
from ditq.nn.call_timestep import ARGUMENT
from ditq.nn.structural.held_tiles import HeldTiles
from ditq.report.evaluate import heldout_conditions
from ditq.report.measure import Speed, measure_speed, table

TORCH, ONNX_FLOAT, ENGINE = "torch float32", "ONNX Runtime float32", "engine"
HALF, COMPILED = "torch bfloat16", "torch bfloat16, compiled"
_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}


def compare_speed(
    transformer: EngineTransformer, checkpoint: Checkpoint, rounds: int = 15, threads: int | None = None
) -> tuple[Speed, str]:
    """(times of one real denoiser call of the original and of the engine, in turns; the name of what others are told by).

    Of an engine on the CPU the original runs there in torch and in ONNX Runtime, in float32; of one on a GPU, there in
    bfloat16, as it is and under torch.compile, where it has room beside the engine.
    """
    return _compared(transformer, checkpoint, real_call(checkpoint, transformer), rounds, threads)


def benchmark(
    engine: Engine, checkpoint: Checkpoint, rounds: int, threads: int | None, decoded: bool = False
) -> list[dict[str, Any]]:
    """Rows of `compare_speed`: name, median_ms, fastest_ms, slowest_ms, times_as_fast (as the first row).

    The engine's own row also has `target` and, where its target can tell, `shares` of the time of a call by kinds of work
    (export/time_shares.py); on a GPU `gpu_bytes`, what the engine and its calls take of its memory.
    """
    free = _free_gpu_bytes()
    transformer = load_engine(engine.folder, threads=threads, decoded=decoded)
    inputs = real_call(checkpoint, transformer)
    taken = free - _free_gpu_bytes()
    speed, reference = _compared(transformer, checkpoint, inputs, rounds, threads)
    rows = list(table(speed, reference))
    own, chosen = rows[-1], target(transformer.target)
    own["target"] = transformer.target
    if chosen.device == "cuda":
        own["gpu_bytes"] = taken
        own["shares"] = time_shares.of_kernels(called(transformer, moved(inputs, "cuda", torch.bfloat16)))
    elif chosen.shares is not None:
        own["shares"] = dict(chosen.shares(engine, engine_inputs(engine, inputs), threads))
    return rows


def _free_gpu_bytes() -> int:
    """Of the GPU's memory, by its driver: what any library has taken is gone from it."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def _compared(
    transformer: EngineTransformer,
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    rounds: int,
    threads: int | None,
) -> tuple[Speed, str]:
    if target(transformer.target).device == "cuda":
        return on_gpu(transformer, checkpoint, inputs, rounds, torch.device("cuda"))
    return _on_cpu(transformer, checkpoint, inputs, rounds, threads)


def _on_cpu(
    transformer: nn.Module, checkpoint: Checkpoint, inputs: Mapping[str, Any], rounds: int, threads: int | None
) -> tuple[Speed, str]:
    if threads is not None:
        torch.set_num_threads(threads)
    original = checkpoint.load_model()
    with tempfile.TemporaryDirectory(prefix="ditq-baseline-") as folder:
        family = checkpoint.family
        made_up, axes = (inputs, {}) if family is None else (_example(transformer, checkpoint), family.axes)
        graph = float_onnx(original, made_up, axes, Path(folder) / "float.onnx")
        session = open_session(graph, session_options(threads))
        known = {item.name: item.type for item in session.get_inputs()}
        tensors = {name: tensor for name, tensor in flatten(inputs)[0].items() if name in known}
        feeds = {name: tensor.numpy().astype(_NUMPY[known[name]]) for name, tensor in tensors.items()}
        callables = {
            TORCH: called(original, inputs),
            ONNX_FLOAT: lambda: session.run(None, feeds),
            ENGINE: called(transformer, inputs),
        }
        return measure_speed(callables, rounds=rounds), TORCH


def on_gpu(
    transformer: nn.Module,
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    rounds: int,
    device: torch.device,
    compiled: bool = True,
) -> tuple[Speed, str]:
    """As `compare_speed`, of what runs on that device; without room for the original there, of the engine alone."""
    inputs = moved(inputs, device, torch.bfloat16)
    callables: dict[str, Callable[[], None]] = {}
    if checkpoint.parameters * torch.bfloat16.itemsize <= FILLED * free_memory(device):
        original = checkpoint.load_model(torch.bfloat16).to(device)
        if compiled:
            callables[COMPILED] = called(torch.compile(original), inputs)
        callables[HALF] = called(original, inputs)
    callables[ENGINE] = called(transformer, inputs)
    finished = {name: _finished(call, device) for name, call in callables.items()}
    return measure_speed(finished, rounds=rounds), next(iter(callables))


def real_call(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """The arguments of one real denoiser call, as the pipeline makes it; made-up ones for a transformer alone."""
    if checkpoint.pipeline_root is None:
        if isinstance(model, EngineTransformer):
            return made_up_call(model.engine, checkpoint)
        return example_inputs(checkpoint)
    calls: list[DenoiserCall] = []
    pipeline = checkpoint.load_pipeline(model)
    settings = SamplingSettings(dict(checkpoint.sampling) | {"num_inference_steps": 1})
    sample(
        pipeline,
        heldout_conditions(checkpoint, 1),
        settings,
        on_denoiser_call=calls.append,
        decode=False,
        progress=False,
    )
    return {name: value for name, value in calls[0].arguments.items() if name != "return_dict"}


def _example(transformer: nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a family's forward takes, of several samples; of the size that the engine is for."""
    if isinstance(transformer, EngineTransformer):
        return made_up_call(transformer.engine, checkpoint)
    return example_inputs(checkpoint)


def made_up_call(engine: Engine, checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of a call that the engine takes, and its original too."""
    return engine.example or example_inputs(checkpoint, picture=only_picture(engine))


def called(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], None]:
    """A call of the model with these arguments, without gradients.

    Calls of an engine that holds tiles are steps of one picture, whose timesteps fall by little: most see tiles, and the
    slowest are those that search them.
    """
    falling = itertools.count() if isinstance(model, EngineTransformer) and _holds_tiles(model.engine) else None

    def run() -> None:
        given = inputs
        if falling is not None:
            timestep = inputs[ARGUMENT]
            given = {**inputs, ARGUMENT: timestep - next(falling) * (1e-4 if timestep.is_floating_point() else 1)}
        with torch.no_grad():
            model(**given, return_dict=False)

    return run


def _holds_tiles(engine: Engine) -> bool:
    return any(part["kind"] == HeldTiles.kind for part in engine.manifest["structure"].get("structural", []))


def _finished(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The call until what it started on a GPU is done."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
