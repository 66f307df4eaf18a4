"""A family read off recorded calls, for a transformer that no file in ditq/families describes.

The recording shows the inputs of its forward, which sizes differ between prompts, and which arguments change from step to
step. What it cannot show stays fixed: an engine is for pictures of the size that was calibrated with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditq.calibration.calibrate import pipeline_class
from ditq.calibration.record import Trajectories
from ditq.calibration.sampling import condition_kind
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.export.arguments import Part, flatten, unflatten
from ditq.families import Family, Inputs
from ditq.trace import trace_forward

NAME = "recorded"
BATCH = "batch"

Tensors = dict[str, Tensor]


def with_family(checkpoint: Checkpoint, trajectories: Trajectories) -> Checkpoint:
    """The checkpoint itself, or, where no family has its class, with one of its recorded calls.

    Raises:
        DitqError: one step was recorded; or an argument changes from step to step that is no tensor, which no engine can take.
    """
    if checkpoint.family is not None:
        return checkpoint
    return checkpoint.told_by(recorded_family(checkpoint, trajectories.in_float32()))


def recorded_family(checkpoint: Checkpoint, trajectories: Trajectories) -> Family:
    """The family of these recorded calls. Raises DitqError as `with_family`."""
    flat = [flatten(arguments) for arguments in _first_calls(trajectories)]
    changing = _changing(checkpoint.name, trajectories)
    varying = _varying([tensors for tensors, _ in flat])
    tensors, layout = max(flat, key=lambda call: _told_apart(call[0], varying))
    axes = {name: [varying.get((name, place)) for place in range(value.dim())] for name, value in tensors.items()}
    batched = _batched(checkpoint, tensors, layout, changing)
    for name in batched:
        axes[name][0] = BATCH

    def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
        return copy.deepcopy(unflatten(_of_samples(tensors, batched, batch), layout))

    pipeline = pipeline_class(checkpoint)
    return Family(
        name=NAME,
        class_names=(checkpoint.class_name,),
        pipeline=pipeline.__name__,
        axes={name: tuple(row) for name, row in axes.items()},
        example_inputs=example_inputs,
        condition=condition_kind(pipeline),
        changing=changing,
    )


def _first_calls(trajectories: Trajectories) -> list[dict[str, Any]]:
    """The arguments of the first call for each condition."""
    numbers: dict[int, int] = {}
    for number, (condition, _) in enumerate(trajectories.places_of_calls()):
        numbers.setdefault(condition, number)
    return [_arguments(call.arguments) for call in trajectories.calls(chosen=frozenset(numbers.values()))]


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "return_dict"}


def _varying(calls: list[Tensors]) -> dict[tuple[str, int], str]:
    """An axis's name for each (tensor, dimension) whose size is not the same for all prompts: one for what varies alike."""
    found: dict[tuple[str, int], str] = {}
    names: dict[tuple[int, ...], str] = {}
    for name, first in calls[0].items():
        others = [call.get(name) for call in calls]
        if any(other is None or other.dim() != first.dim() for other in others):
            continue
        for place in range(1, first.dim()):
            sizes = tuple(other.shape[place] for other in others if other is not None)
            if len(set(sizes)) > 1:
                found[name, place] = names.setdefault(sizes, f"{name.replace('.', '_')}_{place}")
    return found


def _told_apart(tensors: Tensors, varying: Mapping[tuple[str, int], str]) -> tuple[int, int]:
    """How well a trace of a call shows its axes: by sizes above 1, which are not taken for a constant, and different ones."""
    sizes = {axis: tensors[name].shape[place] for (name, place), axis in varying.items()}
    return sum(size > 1 for size in sizes.values()), len(set(sizes.values()))


def _changing(name: str, trajectories: Trajectories) -> tuple[str, ...]:
    """Arguments that differ between the first and the last step of a trajectory."""
    if trajectories.steps < 2:
        raise DitqError(
            f"{name}: one recorded step does not show what changes from step to step; calibrate with 2 or more"
        )
    places = trajectories.places_of_calls()
    ends = places.index((0, 0)), places.index((0, trajectories.steps - 1))
    first, last = (_arguments(call.arguments) for call in trajectories.calls(chosen=frozenset(ends)))
    found = []
    for argument in first:
        (before, one), (after, other) = (flatten({argument: call.get(argument)}) for call in (first, last))
        if one != other:
            raise DitqError(
                f"{name}: its argument '{argument}' changes from step to step and is not a tensor, so no engine can take it"
            )
        if any(not torch.equal(before[key], after[key]) for key in before):
            found.append(argument)
    return tuple(found)


def _batched(checkpoint: Checkpoint, tensors: Tensors, layout: dict[str, Part], changing: tuple[str, ...]) -> list[str]:
    """Tensors with a sample of the batch in each row; none if the model does not run with more samples than were recorded."""
    latents = max(
        (name for name in tensors if name.partition(".")[0] in changing), key=lambda name: tensors[name].numel()
    )
    size = tensors[latents].shape[0]
    found = [name for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == size]
    try:
        trace_forward(checkpoint.skeleton(), unflatten(_of_samples(tensors, found, size + 1), layout))
    except (RuntimeError, ValueError, TypeError, LookupError):
        return []
    return found


def _of_samples(tensors: Tensors, batched: list[str], samples: int) -> Tensors:
    """The first sample's inputs, so many times; without rows of samples what was recorded."""

    def repeated(tensor: Tensor) -> Tensor:
        return tensor[:1].expand(samples, *tensor.shape[1:]).contiguous()

    return {name: repeated(tensor) if name in batched else tensor for name, tensor in tensors.items()}
