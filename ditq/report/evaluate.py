"""Draw the same prompts from the same noise with the original transformer and the engine, and measure the difference.

Both run in the checkpoint's own diffusers pipeline; nothing but `pipeline.transformer` is exchanged.
"""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditq.calibration.batches import moved
from ditq.calibration.calibrate import Conditions, choose_conditions, default_conditions, pipeline_class
from ditq.calibration.prompts import builtin_prompts, spread
from ditq.calibration.sampling import (
    DenoiserCall,
    Sample,
    SamplingSettings,
    check_arguments,
    check_conditions,
    class_count,
    condition_kind,
    expected_steps,
    sample_one,
)
from ditq.checkpoint import BUILT_IN, Checkpoint
from ditq.devices import AUTO, device_of, dtype_on, place_pipeline
from ditq.errors import DitqError
from ditq.export.engine import Engine
from ditq.export.loader import EngineTransformer, load_engine
from ditq.export.targets.torch import rebuild
from ditq.given import check_seed, check_whole, name_of, path_of
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.parts import LinearModulation
from ditq.progress import ProgressSetting, progress_bar
from ditq.quiet import quiet_libraries
from ditq.report import feature_distance, metrics
from ditq.report.alignment import Alignment, LinearBlocks, ScaledChannels
from ditq.report.evaluation import Evaluation, PromptResult, StepResult
from ditq.report.layers import per_layer_sqnr, quantized_sites, site_histograms
from ditq.report.perceptual import NOT_INSTALLED, st_lpips, weights_path
from ditq.report.step_effects import step_effects

LAYER_CONDITIONS, LAYER_CALLS = 4, 6  # layers are measured on this many calls of each of the first so many samples
LARGE = (
    10**13
)  # parameters times numbers of an answer, from which on layers are measured on `LAYER_CALLS` of one sample
HISTOGRAM_SITES, HISTOGRAM_CALLS = 4, 4


@dataclass
class _Drawn:
    """A sample and the denoiser's calls: arguments (where kept), output and scheduler step of each."""

    sample: Sample
    arguments: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def evaluate(
    engine: nn.Module | str | Path,
    checkpoint: Checkpoint | str | Path,
    *,
    conditions: Conditions | None = None,
    steps: int | None = None,
    seed: int = 0,
    limit: int = 32,
    layers: bool = True,
    quantized: nn.Module | None = None,
    name: str = "",
    device: str = AUTO,
    progress: ProgressSetting = None,
) -> Evaluation:
    """Measure what the engine loses against the checkpoint that it was made from.

    Args:
        engine: callable like the checkpoint's transformer, which is put in its place in the pipeline; or an engine folder.
        conditions: prompts or class labels, a file of them, a built-in set's name; None for held-out ones.
        steps: denoising steps; None for the checkpoint's own.
        seed: condition i draws its noise from seed + i, for both models.
        limit: at most this many conditions are drawn.
        layers: measure every quantized linear too (needs the engine's torch form).
        quantized: the engine's torch form, where `engine` runs elsewhere; by default the engine itself.
        name: what the report calls the engine.
        device: where the original and the rest of its pipeline run (devices.py).

    Raises DitqError for conditions or settings that the pipeline does not take, and for latents that are not finite.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    check_whole("limit", limit, 1)
    check_seed(seed)
    if not isinstance(quantized, nn.Module | None):
        raise DitqError(f"quantized is a {type(quantized).__name__}; give the engine's torch form, a module")
    if not isinstance(engine, nn.Module):
        engine, name = load_engine(engine), name or name_of(path_of("engine", engine))
        quantized = quantized or (rebuild(engine.engine) if layers else None)
    if isinstance(engine, EngineTransformer):
        checkpoint = as_calibrated(checkpoint, engine.engine)
    if conditions is None:
        chosen = heldout_conditions(checkpoint, limit)
    else:
        chosen = choose_conditions(checkpoint, conditions, limit)
    place = device_of(device)
    pipeline = checkpoint.load_pipeline(dtype=dtype_on(place))
    by_blocks = place_pipeline(pipeline, place)
    original = pipeline.transformer
    changed = {} if steps is None else {"num_inference_steps": steps}
    settings = SamplingSettings({**checkpoint.sampling, **changed}, seed)
    check_arguments(pipeline, settings.arguments)
    check_conditions(pipeline, chosen)

    tally, left = _Tally(), 0
    kept_calls: list[dict[str, Any]] = []
    with progress_bar("evaluating", len(chosen) * 3 * expected_steps(pipeline, settings), progress) as bar:
        for index, condition in enumerate(chosen):
            draw = partial(_draw, pipeline, condition=condition, settings=settings, index=index, advance=bar.advance)
            reference = draw(original, who="original", keep=True)
            other = draw(engine, who="engine")
            forced, differences = _teacher_forced(engine, reference, bar.advance)
            tally.add(condition, seed + index, reference, other, forced)
            left = max(left, len(reference.sample.steps) - len(set(reference.steps)))
            if index == 0:
                tally.effects = step_effects(pipeline, condition, settings, index, differences)
            kept_calls += _for_layers(index, reference, checkpoint.parameters)
            bar.advance_to((index + 1) * 3 * expected_steps(pipeline, settings))
    evaluation = Evaluation(
        checkpoint=checkpoint.name,
        engine=name or type(engine).__name__,
        arguments=dict(settings.arguments),
        seed=seed,
        prompts=tally.prompts,
        steps=tally.steps(),
        environment=environment(place),
        pictures=tally.pictures,
    )
    if len(tally.pictures) > 1:
        evaluation.lite0_fd = feature_distance.lite0_frechet_distance(*zip(*tally.pictures, strict=True))
    if left:
        evaluation.notes.append(
            f"{left} of {len(other.sample.steps)} steps are drawn by another denoiser of the pipeline, which is as it was"
        )
    if weights_path() is None:
        evaluation.notes.append(f"ST-LPIPS {NOT_INSTALLED}")
    if feature_distance.weights_path() is None:
        evaluation.notes.append(f"lite0-FD {feature_distance.NOT_INSTALLED}")
    if layers:
        calls = [moved(call, "cpu", torch.float32) for call in kept_calls]
        with quiet_libraries():  # which remark on float32 itself
            original = _loaded(checkpoint) if by_blocks else original.to("cpu", torch.float32)
        _measure_layers(evaluation, checkpoint, original, quantized or engine, calls=calls, progress=progress)
    return evaluation


def _for_layers(index: int, drawn: _Drawn, parameters: int) -> Sequence[dict[str, Any]]:
    """Calls of the sample at that place on which layers are measured; of large models fewer: one takes minutes on a CPU."""
    large = parameters * drawn.outputs[0].numel() >= LARGE
    return spread(drawn.arguments, LAYER_CALLS) if index < (1 if large else LAYER_CONDITIONS) else []


def _loaded(checkpoint: Checkpoint) -> nn.Module:
    """The original in float32, on disk where memory is small for it; the files need no folder once they are there."""
    with TemporaryDirectory(prefix="ditq-weights-") as folder:
        return checkpoint.load_model(offload=Path(folder) if checkpoint.larger_than_memory else None)


def heldout_conditions(checkpoint: Checkpoint, limit: int) -> Sequence[str | int]:
    """What to evaluate on when nothing is given: captions, VBench prompts or class labels, evenly spread, none of which
    `calibrate` takes when nothing is given; of a model with so few classes that it takes all, these, from other noise."""
    if checkpoint.name in BUILT_IN:
        return builtin_prompts("mini-heldout")[:limit]
    labelled = condition_kind(pipeline_class(checkpoint)) == "class"
    known = range(class_count(checkpoint.config)) if labelled else builtin_prompts("vbench")
    calibrated = set(default_conditions(checkpoint))
    left = [condition for condition in known if condition not in calibrated]
    return spread(left or list(known), limit)


def as_calibrated(checkpoint: Checkpoint, engine: Engine) -> Checkpoint:
    """The checkpoint, drawn from as it was for the engine's calibration where nobody says otherwise.

    Raises:
        DitqError: the engine was compiled from another one.
    """
    source = engine.manifest["source"]
    if (checkpoint.class_name, checkpoint.fingerprint()) != (engine.manifest["class_name"], source["fingerprint"]):
        raise DitqError(
            f"{engine.folder}: was compiled from {source['name']}, which is not {checkpoint.name} (other weights or config)"
        )
    return replace(checkpoint, sampling={**checkpoint.sampling, **engine.sampling})


@contextmanager
def _in_place(pipeline: Any, transformer: nn.Module) -> Iterator[None]:
    before = pipeline.transformer
    pipeline.transformer = transformer
    try:
        yield
    finally:
        pipeline.transformer = before


def _draw(
    pipeline: Any,
    transformer: nn.Module,
    *,
    condition: str | int,
    settings: SamplingSettings,
    index: int,
    who: str,
    advance: Any,
    keep: bool = False,
) -> _Drawn:
    arguments: list[dict[str, Any]] = []
    outputs: list[Tensor] = []
    steps: list[int] = []

    done = 0

    def before(call: DenoiserCall) -> None:
        arguments.append(_copied(call.arguments))

    def after_call(_module: nn.Module, _given: Any, output: Any) -> None:
        outputs.append(_first(output))
        steps.append(done)

    def after_step(_record: Any) -> None:
        nonlocal done
        done += 1
        advance()

    handle = transformer.register_forward_hook(after_call)
    try:
        with _in_place(pipeline, transformer), torch.no_grad():
            sample = sample_one(
                pipeline, condition, settings, index, on_denoiser_call=before if keep else None, on_step=after_step
            )
    except DitqError as error:
        raise DitqError(f"{who}: {error}") from error
    finally:
        handle.remove()
    return _Drawn(sample, arguments, outputs, steps)


@torch.no_grad()
def _teacher_forced(engine: nn.Module, reference: _Drawn, advance: Any) -> tuple[list[float], dict[int, list[Tensor]]]:
    """The engine's output on each input of the original: its relative errors, and by step what it is off by in each call."""
    errors, differences = [], defaultdict(list)
    for number, (arguments, output) in enumerate(zip(reference.arguments, reference.outputs, strict=True)):
        found = _first(engine(**_copied(arguments)))
        errors.append(metrics.relative_error(output, found))
        differences[reference.steps[number]].append(found - output)
        if number + 1 == len(reference.steps) or reference.steps[number + 1] != reference.steps[number]:
            advance()
    return errors, dict(differences)


def _first(output: Any) -> Tensor:
    """The prediction in a denoiser's output (a tensor, a tuple or diffusers' output class), copied to the CPU."""
    tensor = output if isinstance(output, Tensor) else output[0]
    return tensor.detach().to("cpu", copy=True)


def _copied(value: Any) -> Any:
    """The same nest of dicts, lists and tuples with its tensors copied, so that nobody changes them afterwards."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(_copied(item) for item in value) if type(value) in (list, tuple) else value


class _Tally:
    """Adds up prompts and steps."""

    def __init__(self) -> None:
        self.prompts: list[PromptResult] = []
        self.pictures: list[tuple[Any, Any]] = []
        self._forced: dict[int, list[float]] = {}
        self._accumulated: dict[int, list[float]] = {}
        self._latents: dict[int, list[float]] = {}
        self._timesteps: dict[int, float] = {}
        self.effects: dict[int, float] = {}

    def add(self, condition: str | int, seed: int, reference: _Drawn, other: _Drawn, forced: list[float]) -> None:
        if reference.steps != other.steps:
            raise DitqError(
                f"{condition!r}: the engine was called {len(other.steps)} times, not {len(reference.steps)}"
            )
        for step, error, a, b in zip(reference.steps, forced, reference.outputs, other.outputs, strict=True):
            self._forced.setdefault(step, []).append(error)
            self._accumulated.setdefault(step, []).append(metrics.relative_error(a, b))
        for first, second in zip(reference.sample.steps, other.sample.steps, strict=True):
            self._timesteps[first.step] = first.timestep
            self._latents.setdefault(first.step, []).append(metrics.relative_error(first.latents, second.latents))
        self.pictures.append((reference.sample.image, other.sample.image))
        original, engine = np.asarray(reference.sample.image), np.asarray(other.sample.image)
        error = metrics.mean_squared_error(original, engine)
        found = [(who, metrics.defect(picture)) for who, picture in (("original", original), ("engine", engine))]
        self.prompts.append(
            PromptResult(
                condition=condition,
                seed=seed,
                psnr=metrics.psnr_of(error),
                ssim=metrics.ssim(original, engine) if min(original.shape[:2]) >= metrics.SSIM_WINDOW else None,
                mean_squared_error=error,
                st_lpips=st_lpips(original, engine),
                latent_error=metrics.relative_error(reference.sample.latents, other.sample.latents),
                defects=[f"the {who}'s picture {what}" for who, what in found if what is not None],
            )
        )

    def steps(self) -> list[StepResult]:
        return [
            StepResult(
                step,
                self._timesteps[step],
                float(np.mean(self._forced[step])),
                float(np.mean(self._accumulated[step])),
                float(np.mean(self._latents[step])),
                self.effects.get(step),
            )
            for step in sorted(self._forced)
        ]


def _measure_layers(
    evaluation: Evaluation,
    checkpoint: Checkpoint,
    original: nn.Module,
    quantized: nn.Module,
    *,
    calls: list[dict[str, Any]],
    progress: ProgressSetting,
) -> None:
    if not quantized_sites(quantized):
        evaluation.notes.append("no layer was measured: the engine's torch form holds no quantized linear")
        return
    recorded = {name: value for name, value in calls[0].items() if name != "return_dict"}
    graph = DiTGraph(original, recorded if checkpoint.family is None else example_inputs(checkpoint))
    evaluation.sites = per_layer_sqnr(
        original,
        quantized,
        calls,
        kinds={name: site.kind or site.role for name, site in graph.sites.items()},
        alignments=_alignments(graph),
        progress=progress,
    )
    if not evaluation.sites:
        evaluation.notes.append("no layer was measured: what was quantized has no counterpart in the original")
        return
    ranked = sorted(evaluation.sites, key=lambda site: site.sqnr_db)
    worst_by_kind: dict[str, str] = {}
    for site in ranked:
        worst_by_kind.setdefault(site.kind, site.site)
    shown = list(dict.fromkeys([*list(worst_by_kind.values())[:HISTOGRAM_SITES], ranked[-1].site]))
    evaluation.histograms = site_histograms(original, quantized, spread(calls, HISTOGRAM_CALLS), shown)


def _alignments(graph: DiTGraph) -> dict[str, Alignment]:
    """For the sites whose outputs passes write in another basis: scales, shifts and an orthogonal matrix a head may have been
    moved from the values to what reads the attention, scales and shifts of a group's input into the modulation in front of it.
    """
    modulations = {group.feed.site for group in graph.groups.values() if isinstance(group.feed, LinearModulation)}
    values = {site: item.head_width for item in graph.attentions.values() for site in item.values}
    return {
        **{site: ScaledChannels() for site in modulations},
        **{site: LinearBlocks(width) for site, width in values.items()},
    }


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers were measured with: where the original drew, machine label, versions; no names of hosts or folders."""
    packages = ("torch", "diffusers", "transformers", "onnxruntime", "numpy")
    return {
        "original drawn in": f"{str(dtype_on(device)).removeprefix('torch.')} on {_label(device)}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _label(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
