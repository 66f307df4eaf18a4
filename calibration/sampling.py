"""Drawing samples with a real diffusers pipeline while watching its denoiser: every call, every step, fixed seeds."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ditq.calibration.prompts import ConditionKind, check_prompts, is_unicode
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.progress import ProgressSetting, progress_bar

# What sample() itself hands to the pipeline.
RESERVED_ARGUMENTS = ("prompt", "class_labels", "generator", "output_type", "return_dict")
WHOLE_NUMBERS = ("num_inference_steps", "height", "width", "max_sequence_length")


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw: keyword arguments of the pipeline's call, and the seed of the first condition's noise.

    Condition i draws its noise from `seed + i` alone, so a sample does not depend on its neighbours.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def for_checkpoint(
        cls,
        checkpoint: Checkpoint,
        steps: int | None = None,
        seed: int = 0,
        arguments: Mapping[str, Any] | None = None,
    ) -> SamplingSettings:
        """The checkpoint's own defaults (its sampling.json), then `arguments`, then `steps`, where they are given.

        Raises:
            DitqError: arguments that are not a dictionary with words for names.
        """
        if not isinstance(arguments, Mapping | None) or not all(isinstance(name, str) for name in arguments or {}):
            raise DitqError(f"arguments is {arguments!r}; give a dictionary of the pipeline's own, by name")
        merged = {**checkpoint.sampling, **(arguments or {})}
        if steps is not None:
            merged["num_inference_steps"] = steps
        return cls(merged, seed)


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser: all its arguments by name, as they were given.

    `condition` is the index of the condition, `call` counts the calls of this sample, `step` its scheduler steps.
    """

    condition: int
    call: int
    step: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class StepRecord:
    """One step of the scheduler, tensors on the CPU.

    `timestep` is the scheduler's own; `model_output` what the scheduler was given (after guidance); `latents` what it
    returned.
    """

    step: int
    timestep: float
    model_output: torch.Tensor
    latents: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """What was drawn for one condition: picture (PIL image; None when not decoded), last latents, all steps."""

    image: Any
    latents: torch.Tensor
    steps: list[StepRecord]


def condition_kind(pipeline: Any) -> ConditionKind:
    """What the pipeline (or pipeline class) is conditioned on, read from its call's signature."""
    names = _call_parameters(pipeline)
    if "prompt" in names:
        return "prompt"
    if "class_labels" in names:
        return "class"
    raise DitqError(f"{_class_name(pipeline)} takes neither a prompt nor class_labels; ditq cannot draw with it")


def check_arguments(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Raise DitqError for an argument that the pipeline's call does not take, or that `sample` sets itself."""
    taken = _call_parameters(pipeline)
    names = [name for name in taken if name not in RESERVED_ARGUMENTS]
    for name, value in arguments.items():
        if name in RESERVED_ARGUMENTS:
            raise DitqError(f"sampling argument '{name}' is set by ditq itself; leave it out")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(names)}"
            raise DitqError(f"{_class_name(pipeline)} has no sampling argument '{name}'; {hint}")
        if name in WHOLE_NUMBERS and value is not None and not (_is_whole(value) and value >= 1):
            raise DitqError(f"sampling argument '{name}' is {value!r}; give a whole number of at least 1")
        if not _can_be_written(value):
            raise DitqError(f"sampling argument '{name}' is {value!r}; give finite numbers, and texts as UTF-8")
        if type(taken[name].default) in (int, float) and isinstance(value, str):
            raise DitqError(f"sampling argument '{name}' is {value!r}; give a number")


def check_conditions(pipeline: Any, conditions: Sequence[str | int]) -> None:
    """Raise DitqError unless the conditions are what the pipeline takes: prompts, or labels of the model's classes."""
    if condition_kind(pipeline) == "prompt":
        check_prompts(conditions)  # type: ignore[arg-type]  # it checks the types itself
        return
    if not conditions:
        raise DitqError("no class labels; give at least one")
    classes = class_count(pipeline.transformer.config)
    for index, label in enumerate(conditions):
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
            raise DitqError(
                f"condition {index} is {label!r}; {_class_name(pipeline)} takes labels from 0 to {classes - 1}"
            )


def class_count(config: Mapping[str, Any]) -> int:
    """The number of classes that a class-conditional transformer with this config knows."""
    return int(config["num_embeds_ada_norm"])


def expected_steps(pipeline: Any, settings: SamplingSettings) -> int:
    """The number of denoising steps asked for (schedulers of higher order take more)."""
    default = _call_parameters(pipeline)["num_inference_steps"].default
    return int(settings.arguments.get("num_inference_steps", default))


def sample(
    pipeline: Any,
    conditions: Sequence[str | int],
    settings: SamplingSettings,
    *,
    on_denoiser_call: Callable[[DenoiserCall], None] | None = None,
    on_step: Callable[[int, StepRecord], None] | None = None,
    decode: bool = True,
    progress: ProgressSetting = None,
) -> list[Sample]:
    """Draw one sample for each condition with the pipeline's own scheduler, text encoders and guidance.

    `on_denoiser_call` gets every call of `pipeline.transformer` just before it runs; `on_step` gets (index of the
    condition, step) after every step of the scheduler. `decode=False` leaves out the picture where the pipeline can.
    Raises DitqError for arguments or conditions that the pipeline does not take and for latents that are not finite.
    """
    check_arguments(pipeline, settings.arguments)
    check_conditions(pipeline, conditions)
    samples = []
    steps = expected_steps(pipeline, settings)
    with progress_bar("sampling", len(conditions) * steps, progress) as bar:
        for index, condition in enumerate(conditions):

            def after_step(record: StepRecord, index: int = index) -> None:
                bar.advance_to(index * steps + min(record.step + 1, steps))
                if on_step is not None:
                    on_step(index, record)

            samples.append(
                sample_one(
                    pipeline,
                    condition,
                    settings,
                    index,
                    on_denoiser_call=on_denoiser_call,
                    on_step=after_step,
                    decode=decode,
                )
            )
            bar.advance_to((index + 1) * steps)
    return samples


def sample_one(
    pipeline: Any,
    condition: str | int,
    settings: SamplingSettings,
    index: int = 0,
    *,
    on_denoiser_call: Callable[[DenoiserCall], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    decode: bool = True,
    copies: int = 1,
) -> Sample:
    """Draw the sample of the condition at place `index` (seed `settings.seed + index`); see `sample`.

    With `copies` it is drawn so many times at once, all from the same noise: the first dimension of all tensors.
    """
    steps: list[StepRecord] = []
    calls = 0

    def watch_call(module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal calls
        if on_denoiser_call is not None:
            arguments = _bind(module, positional, named)
            on_denoiser_call(DenoiserCall(condition=index, call=calls, step=len(steps), arguments=arguments))
        calls += 1

    def watch_step(timestep: float, model_output: torch.Tensor, latents: torch.Tensor) -> None:
        record = StepRecord(len(steps), timestep, _keep(model_output), _keep(latents))
        if not record.latents.isfinite().all():
            raise DitqError(
                f"drawing {condition!r}: the latents are not finite after step {record.step}; "
                "the checkpoint or its number format overflows"
            )
        steps.append(record)
        if on_step is not None:
            on_step(record)

    parameters = _call_parameters(pipeline)
    arguments = dict(settings.arguments)
    if condition_kind(pipeline) == "prompt":
        arguments["prompt"] = condition if copies == 1 else [condition] * copies
    else:
        arguments["class_labels"] = [condition] * copies
    if "output_type" in parameters:
        arguments["output_type"] = "pil" if decode else "latent"
    noise = [torch.Generator("cpu").manual_seed(settings.seed + index) for _ in range(copies)]
    arguments["generator"] = noise if copies > 1 else noise[0]

    denoiser = getattr(pipeline, "transformer", None)
    if not isinstance(denoiser, torch.nn.Module):
        raise DitqError(f"{_class_name(pipeline)} has no transformer; ditq works on diffusion transformers")
    handle = denoiser.register_forward_pre_hook(watch_call, with_kwargs=True)
    try:
        # Some pipelines do not pass their generator to a stochastic scheduler, which then draws from the global one.
        with torch.random.fork_rng(), _quiet(pipeline), _watched_scheduler(pipeline.scheduler, watch_step):
            torch.manual_seed(settings.seed + index)
            output = pipeline(**arguments)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DitqError(f"{_class_name(pipeline)} cannot draw {condition!r}: {reason}") from error
    finally:
        handle.remove()
    if not steps:
        raise DitqError(f"{_class_name(pipeline)} drew {condition!r} without a step of its scheduler; ditq needs one")
    return Sample(image=_picture(output) if decode else None, latents=steps[-1].latents, steps=steps)


def _picture(output: Any) -> Any:
    """What the pipeline drew first; of a video the frame in its middle."""
    if hasattr(output, "images"):
        return output.images[0]
    frames = output.frames[0]
    return frames[len(frames) // 2]


def _can_be_written(value: Any) -> bool:
    """Whether no number in it is infinite or not a number, and no text holds half a character."""
    if isinstance(value, Mapping):
        return all(_can_be_written(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(_can_be_written(item) for item in value)
    if isinstance(value, str):
        return is_unicode(value)
    return not isinstance(value, float) or math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    parameters = dict(inspect.signature(cls.__call__).parameters)
    parameters.pop("self")
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _class_name(pipeline: Any) -> str:
    return pipeline.__name__ if isinstance(pipeline, type) else type(pipeline).__name__


def _bind(module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward call by name (PixArt and DiT pipelines pass the latents by position)."""
    own = getattr(module, "call_signature", None)  # of an engine, whose forward takes what its original's does
    signature = own if isinstance(own, inspect.Signature) else inspect.signature(module.forward)
    bound = signature.bind(*positional, **named).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL and bound.pop(parameter.name, ()):
            raise DitqError(f"{type(module).__name__} was called with unnamed extra arguments; they cannot be recorded")
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    return dict(bound)


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


@contextmanager
def _watched_scheduler(scheduler: Any, watch: Callable[[float, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Call `watch(timestep, model output, new latents)` after each `scheduler.step` inside the block."""
    original = scheduler.step
    signature = inspect.signature(original)

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        output = original(*args, **kwargs)
        watch(float(bound["timestep"]), bound["model_output"], output[0])
        return output

    # Pipelines look at this signature to see which arguments (generator, eta) the scheduler takes.
    step.__signature__ = signature  # type: ignore[attr-defined]
    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar, which knows nothing of the other conditions."""
    before = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**(before or {}))
