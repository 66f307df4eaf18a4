"""An engine folder against its original: evaluation, sizes, speed and memory gathered, and the report written into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ditq.calibration.sampling import SamplingSettings, sample
from ditq.checkpoint import BUILT_IN, Checkpoint
from ditq.devices import AUTO, device_of, dtype_on, place_pipeline
from ditq.errors import DitqError
from ditq.export.engine import Engine
from ditq.export.loader import load_engine
from ditq.export.targets import target as target_named
from ditq.export.targets.torch import rebuild
from ditq.folders import check_output
from ditq.progress import ProgressSetting
from ditq.report.evaluate import Conditions, as_calibrated, evaluate
from ditq.report.evaluation import Evaluation
from ditq.report.html import page_of, write_report
from ditq.report.measure import file_sizes, peak_memory
from ditq.report.pictures import image_grid
from ditq.report.speed import ENGINE, TORCH, called, compare_speed, made_up_call
from ditq.report.speed import benchmark as speed_of


def original_of(engine: Engine, against: Checkpoint | str | None, option: str = "--against") -> Checkpoint:
    """The checkpoint that an engine is compared with, or drawn around, with the sampling of the engine's calibration.

    option: of the command, that gives it.

    Raises:
        DitqError: none was given and the engine was not compiled from a built-in one, or it is another model.
    """
    name = engine.manifest["source"]["name"]
    if against is None and name not in BUILT_IN:
        raise DitqError(f"{engine.folder}: was compiled from {name}; say where that is with {option}")
    checkpoint = against if isinstance(against, Checkpoint) else Checkpoint.open(against or name)
    return as_calibrated(checkpoint, engine)


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
    if where is not None:
        check_output(page_of(where), force=True)
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
        info["speed"], info["speed_reference"] = compare_speed(transformer, checkpoint)
        if target_named(transformer.target).device == "cpu":
            run = "ditq.report.engine_report:run"
            info["memory"] = {
                ENGINE: peak_memory(f"{run}_engine_once", str(engine.folder), str(checkpoint.root)),
                TORCH: peak_memory(f"{run}_original_once", str(engine.folder), str(checkpoint.root)),
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


def benchmark(
    engine_folder: str, against: str | None, rounds: int, threads: int | None, decoded: bool = False
) -> list[dict[str, Any]]:
    """What speed.benchmark tells of an engine folder and its original."""
    engine = Engine.open(engine_folder)
    return speed_of(engine, original_of(engine, against), rounds, threads, decoded)


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
    device: str = AUTO,
    decoded: bool = False,
) -> Any:
    """Draw one picture with the engine in its pipeline; with `against`, the original beside it. A PIL image.

    device: where the original and the rest of the pipeline run (devices.py); the engine runs where its target does.
    decoded: see `load_engine`.
    """
    place = device_of(device)
    engine = Engine.open(engine_folder)
    source = original_of(engine, checkpoint or against, "--checkpoint")
    settings = dict(source.sampling) | ({} if steps is None else {"num_inference_steps": steps}) | dict(arguments or {})
    condition: str | int = prompt
    if source.family and source.family.condition == "class":
        if not prompt.isdecimal():
            raise DitqError(f"{prompt!r} is not a class label; {source.name} is asked by a whole number, e.g. 207")
        condition = int(prompt)

    beside = source if checkpoint is None or against is None else original_of(engine, against)

    def drawn_by(source: Checkpoint, transformer: nn.Module | None) -> Any:
        pipeline = source.load_pipeline(transformer, dtype_on(place))
        place_pipeline(pipeline, place)
        return sample(pipeline, [condition], SamplingSettings(settings, seed))[0].image

    drawn = drawn_by(source, load_engine(engine.folder, target, decoded=decoded))
    if against is None:
        return drawn
    return image_grid([[drawn_by(beside, None), drawn]], ["original", "engine"])


def run_engine_once(folder: str, original: str) -> None:
    """Load an engine and call it once, on its original's inputs; run in a process of its own to measure memory."""
    transformer = load_engine(folder)
    engine, checkpoint = transformer.engine, Checkpoint.open(original)
    called(transformer, made_up_call(engine, checkpoint))()


def run_original_once(folder: str, original: str) -> None:
    """Load the original of an engine and call it once; run in a process of its own to measure memory."""
    checkpoint = Checkpoint.open(original)
    called(checkpoint.load_model(), made_up_call(Engine.open(folder, verify=False), checkpoint))()


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
