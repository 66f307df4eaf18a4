"""An engine folder against its original: evaluation, sizes, speed and memory gathered, and the report written into it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq.calibration.sampling import DenoiserCall, SamplingSettings, sample
from ditq.checkpoint import BUILT_IN, Checkpoint
from ditq.devices import AUTO
from ditq.errors import DitqError
from ditq.export import time_shares
from ditq.export.arguments import flatten
from ditq.export.baseline import float_onnx
from ditq.export.engine import Engine
from ditq.export.loader import engine_inputs, load_engine, only_picture
from ditq.export.session import open_session, session_options
from ditq.export.targets import target
from ditq.export.targets.torch import rebuild
from ditq.inspection import example_inputs
from ditq.progress import ProgressSetting
from ditq.report.evaluate import Conditions, evaluate, heldout_conditions
from ditq.report.evaluation import Evaluation
from ditq.report.html import write_report
from ditq.report.measure import Speed, file_sizes, measure_speed, peak_memory, table
from ditq.report.pictures import image_grid

_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}
TORCH, ONNX_FLOAT, ENGINE = "torch float32", "ONNX Runtime float32", "engine"


def original_of(engine: Engine, against: Checkpoint | str | None) -> Checkpoint:
    """The checkpoint that an engine is compared with.

    Raises:
        DitqError: none was given and the engine was not compiled from a built-in one, or it is another model.
    """
    name = engine.manifest["source"]["name"]
    if against is None and name not in BUILT_IN:
        raise DitqError(f"{engine.folder}: was compiled from {name}; say where that is with --against")
    checkpoint = against if isinstance(against, Checkpoint) else Checkpoint.open(against or name)
    if (
        checkpoint.class_name != engine.manifest["class_name"]
        or checkpoint.fingerprint() != engine.manifest["source"]["fingerprint"]
    ):
        raise DitqError(
            f"{engine.folder}: was compiled from {name}, which is not {checkpoint.name} (other weights or config)"
        )
    return checkpoint


def report_on(
    engine_folder: str | Path,
    against: Checkpoint | str | None = None,
    *,
    conditions: Conditions | str | Path | None = None,
    limit: int = 32,
    steps: int | None = None,
    seed: int = 1000,
    target: str = "auto",
    where: str | Path | None = None,
    device: str = AUTO,
    speed: bool = True,
    progress: ProgressSetting = None,
) -> Evaluation:
    """Evaluate an engine and write report.html and report.json, into its folder unless `where` says otherwise.

    `speed` also times it against the original and measures peak memory, which takes some seconds more.
    """
    engine = Engine.open(engine_folder)
    checkpoint = original_of(engine, against)
    transformer = load_engine(engine.folder, target)
    evaluation = evaluate(
        transformer,
        checkpoint,
        conditions=conditions,
        steps=steps,
        seed=seed,
        limit=limit,
        quantized=rebuild(engine),
        name=f"{engine.name} ({transformer.target})",
        device=device,
        progress=progress,
    )
    sizes = file_sizes(engine.folder, checkpoint)
    info: dict[str, Any] = {
        "folder": engine.name,
        "target": transformer.target,
        "class": engine.manifest["class_name"],
        "source": engine.manifest["source"],
        "sizes": sizes,
    }
    if speed:
        info["speed"], info["speed_reference"] = compare_speed(engine, checkpoint), TORCH
        info["memory"] = {
            ENGINE: peak_memory("ditq.report.engine_report:run_engine_once", str(engine.folder), str(checkpoint.root)),
            TORCH: peak_memory("ditq.report.engine_report:run_original_once", str(checkpoint.root)),
        }
    write_report(
        where or engine.folder, evaluation, info, engine.manifest.get("reports", []), engine.manifest["recipe"]
    )
    if where is None:
        measured = {
            "summary": evaluation.summary,
            "prompts": len(evaluation.prompts),
            "size_to_fp32": sizes.ratio_to_fp32,
            "size_to_bf16": sizes.ratio_to_bf16,
        }
        engine.update(measured={key: _finite(value) for key, value in measured.items()})
    return evaluation


def compare_speed(engine: Engine, checkpoint: Checkpoint, rounds: int = 15, threads: int | None = None) -> Speed:
    """Time one real denoiser call of the original in torch and ONNX Runtime float32 and of the engine, in turns."""
    original = checkpoint.load_model()
    inputs = real_call(checkpoint, original)
    return _timed(checkpoint, original, load_engine(engine.folder, threads=threads), inputs, rounds, threads)


def _timed(
    checkpoint: Checkpoint,
    original: nn.Module,
    transformer: nn.Module,
    inputs: Mapping[str, Any],
    rounds: int,
    threads: int | None,
) -> Speed:
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="ditq-baseline-") as folder:
        axes = checkpoint.family.axes if checkpoint.family else {}
        graph = float_onnx(original, example_inputs(checkpoint), axes, Path(folder) / "float.onnx")
        session = open_session(graph, session_options(threads))
        known = {item.name: item.type for item in session.get_inputs()}
        tensors = {name: tensor for name, tensor in flatten(inputs)[0].items() if name in known}
        feeds = {name: tensor.numpy().astype(_NUMPY[known[name]]) for name, tensor in tensors.items()}
        callables = {
            TORCH: _call(original, inputs),
            ONNX_FLOAT: lambda: session.run(None, feeds),
            ENGINE: _call(transformer, inputs),
        }
        return measure_speed(callables, rounds=rounds)


def real_call(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """The arguments of one real denoiser call, as the pipeline makes it; made-up ones for a transformer alone."""
    if checkpoint.pipeline_root is None:
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


def benchmark(engine_folder: str, against: str | None, rounds: int, threads: int | None) -> list[dict[str, Any]]:
    """Rows of `compare_speed`: name, median_ms, fastest_ms, slowest_ms, times_as_fast (as torch float32).

    The engine's own row also has `target` and, where its target can tell, `shares` of the time of a call by kinds of work
    (export/time_shares.py); on a GPU `gpu_bytes`, what the engine and its calls take of its memory.
    """
    engine = Engine.open(engine_folder)
    checkpoint = original_of(engine, against)
    original = checkpoint.load_model()
    inputs = real_call(checkpoint, original)
    free = _free_gpu_bytes()
    transformer = load_engine(engine.folder, threads=threads)
    rows = list(table(_timed(checkpoint, original, transformer, inputs, rounds, threads), TORCH))
    own, chosen = rows[-1], target(transformer.target)
    own["target"] = transformer.target
    if chosen.device == "cuda":
        own["gpu_bytes"] = free - _free_gpu_bytes()
        own["shares"] = time_shares.of_kernels(_call(transformer, inputs))
    elif chosen.shares is not None:
        own["shares"] = dict(chosen.shares(engine, engine_inputs(engine, inputs), threads))
    return rows


def _free_gpu_bytes() -> int:
    """Of the GPU's memory, by its driver: what any library has taken is gone from it."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def draw(
    engine_folder: str,
    prompt: str,
    *,
    checkpoint: str | None = None,
    against: str | None = None,
    target: str = "auto",
    steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """Draw one picture with the engine in its pipeline; with `against`, the original beside it. A PIL image."""
    engine = Engine.open(engine_folder)
    source = original_of(engine, checkpoint or against)
    settings = dict(source.sampling) | ({} if steps is None else {"num_inference_steps": steps}) | dict(arguments or {})
    pipeline = source.load_pipeline(load_engine(engine.folder, target))
    condition: str | int = prompt
    if source.family and source.family.condition == "class":
        if not prompt.isdecimal():
            raise DitqError(f"{prompt!r} is not a class label; {source.name} is asked by a whole number, e.g. 207")
        condition = int(prompt)
    drawn = sample(pipeline, [condition], SamplingSettings(settings, seed))[0].image
    if against is None:
        return drawn
    pipeline = source.load_pipeline()
    original = sample(pipeline, [condition], SamplingSettings(settings, seed))[0].image
    return image_grid([[original, drawn]], ["original", "engine"])


def run_engine_once(folder: str, original: str) -> None:
    """Load an engine and call it once, on its original's inputs; run in a process of its own to measure memory."""
    transformer = load_engine(folder)
    _call(transformer, example_inputs(Checkpoint.open(original), picture=only_picture(transformer.engine)))()


def run_original_once(path: str) -> None:
    """Load an original and call it once; run in a process of its own to measure memory."""
    checkpoint = Checkpoint.open(path)
    _call(checkpoint.load_model(), example_inputs(checkpoint))()


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    def run() -> None:
        with torch.no_grad():
            model(**inputs, return_dict=False)

    return run


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
