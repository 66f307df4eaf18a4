"""Recorded calls of the denoiser, a sample of them over all conditions and steps, joined into batches to be run together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ditq.calibration.record import RecordedCall, Trajectories

MEMORY = 1 << 30  # bytes of calls up to which a stream keeps all that it ever gives
HELD_OUT = 8  # every eighth condition judges what was learned on the others


@dataclass(frozen=True, eq=False)
class CallBatch:
    """Calls run as one: the denoiser's arguments, and the scheduler step int64 [B] that each sample belongs to.

    Samples that one step of one trajectory needs, its guidance branches, stand one after the other: `branches` of them.
    """

    arguments: dict[str, Any]
    steps: Tensor
    branches: int = 1


def held_out_conditions(trajectories: Trajectories) -> list[int]:
    """The conditions, by number, that nothing is learned from: every eighth, or the last of fewer. None of a single one."""
    count = len(trajectories.conditions)
    return list(range(count))[HELD_OUT - 1 :: HELD_OUT] or list(range(count))[-1:][: count - 1]


def teaching_conditions(trajectories: Trajectories) -> list[int]:
    """The conditions, by number, that may be learned from: all that are not held out."""
    judging = set(held_out_conditions(trajectories))
    return [number for number in range(len(trajectories.conditions)) if number not in judging]


def sampled_batches(
    trajectories: Trajectories, samples: int, batch: int, seed: int = 0, conditions: Collection[int] | None = None
) -> list[CallBatch]:
    """About `samples` samples in batches of at most `batch`: evenly from all steps, mixed in every batch.

    All guidance branches of a step are taken together, in one call or in several, where their arguments have the same shapes;
    only such calls are joined. The same seed gives the same batches. `conditions`: numbers of those to take calls from.
    """
    generator = torch.Generator().manual_seed(seed)
    units = units_of(trajectories, conditions)
    step_of = trajectories.steps_of_calls()
    steps = [step_of[unit[0]] for unit in units]
    mixed = torch.randperm(len(units), generator=generator).tolist()
    by_step = sorted(mixed, key=steps.__getitem__)  # the units of a step stay mixed
    first = trajectories.calls(chosen=frozenset(units[0]))
    size = sum(batch_size(call.arguments) for call in first)
    wanted = min(len(units), max(1, samples // size))
    chosen = {by_step[index * len(units) // wanted] for index in range(wanted)}
    numbers = sorted(number for place in chosen for number in units[place])
    found = dict(zip(numbers, trajectories.calls(chosen=frozenset(numbers)), strict=True))
    waiting: dict[Any, list[RecordedCall]] = {}
    batches = []
    for place in [place for place in mixed if place in chosen]:
        key = shapes_of(found[units[place][0]].arguments)
        calls = waiting.setdefault(key, [])
        calls += [found[number] for number in units[place]]
        if batch_size(calls[0].arguments) * len(calls) + size > batch:
            batches.append(_batch(waiting.pop(key), size))
    return batches + [_batch(rest, size) for rest in waiting.values()]


@dataclass(frozen=True, eq=False)
class CallStream:
    """Batches of recorded calls without end, by number: mixed anew in every round. They are read from disk when asked for, once
    where all of them are small.

    Attributes:
        units: numbers of calls that are taken together, the guidance branches of a step.
        together: units in a batch.
    """

    trajectories: Trajectories
    units: list[list[int]]
    together: int
    seed: int

    @classmethod
    def of(cls, trajectories: Trajectories, conditions: Collection[int], batch: int, seed: int = 0) -> CallStream:
        """Of the calls of these conditions, about `batch` samples at a time."""
        units = units_of(trajectories, conditions)
        first = trajectories.calls(chosen=frozenset(units[0]))
        size = sum(batch_size(call.arguments) for call in first)
        return cls(trajectories, units, min(max(1, batch // size), len(units)), seed)

    def batch(self, number: int) -> list[CallBatch]:
        """The batch of that number; several where its calls have different shapes and cannot be joined."""
        turn, place = divmod(number, len(self.units) // self.together)
        generator = torch.Generator().manual_seed((self.seed + 7919 * turn) % 2**63)
        mixed = torch.randperm(len(self.units), generator=generator).tolist()
        chosen = [self.units[index] for index in mixed[place * self.together : (place + 1) * self.together]]
        numbers = [call for unit in chosen for call in unit]
        found = self._read(numbers) if self._kept is None else self._kept
        alike: dict[Any, list[RecordedCall]] = {}
        branches = len(chosen[0]) * batch_size(found[chosen[0][0]].arguments)
        for unit in chosen:
            alike.setdefault(shapes_of(found[unit[0]].arguments), []).extend(found[call] for call in unit)
        return [_batch(calls, branches) for calls in alike.values()]

    @cached_property
    def _kept(self) -> dict[int, RecordedCall] | None:
        """All calls by number, or None where they are too many to be kept."""
        first = next(iter(self._read(self.units[0]).values()))
        count = sum(map(len, self.units))
        if count * bytes_of(first.arguments) > MEMORY:
            return None
        return self._read([call for unit in self.units for call in unit])

    def _read(self, numbers: Sequence[int]) -> dict[int, RecordedCall]:
        return dict(zip(sorted(numbers), self.trajectories.calls(chosen=frozenset(numbers)), strict=True))


def units_of(trajectories: Trajectories, conditions: Collection[int] | None = None) -> list[list[int]]:
    """Numbers of the calls that are taken together: those of a condition's step, or each alone where shapes differ."""
    together: dict[tuple[int, int], list[int]] = {}
    for number, place in enumerate(trajectories.places_of_calls()):
        if conditions is None or place[0] in conditions:
            together.setdefault(place, []).append(number)
    first = next(iter(together.values()))
    shapes = {repr(shapes_of(call.arguments)) for call in trajectories.calls(chosen=frozenset(first))}
    same = len(shapes) == 1 and {len(unit) for unit in together.values()} == {len(first)}
    return list(together.values()) if same else [[number] for unit in together.values() for number in unit]


def batch_size(arguments: Mapping[str, Any]) -> int:
    """Samples in a call: the first dimension of its first tensor, the latents."""
    return next(value.shape[0] for value in arguments.values() if isinstance(value, Tensor))


def moved(value: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Arguments of a forward call on a device and, where `dtype` is given, tensors of floating types in that dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device, dtype) for item in value)
    return value


def bytes_of(value: Any) -> int:
    """Of all tensors among a call's arguments."""
    if isinstance(value, Mapping):
        return sum(map(bytes_of, value.values()))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def joined(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One call for several whose arguments have the same shapes: tensors with a row a sample one after the other.

    What is not by sample (position ids, settings) is taken from the first call.
    """
    size = batch_size(calls[0])
    return {name: _joined([call[name] for call in calls], size) for name in calls[0]}


def _batch(calls: Sequence[RecordedCall], branches: int) -> CallBatch:
    steps = [torch.full((batch_size(call.arguments),), call.step) for call in calls]
    return CallBatch(joined([call.arguments for call in calls]), torch.cat(steps), branches)


def _joined(values: Sequence[Any], size: int) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values], size) for name in first}
    if isinstance(first, Tensor) and first.dim() and first.shape[0] == size:
        return torch.cat(list(values))
    return first


def shapes_of(value: Any) -> Any:
    """What calls must have in common to be joined."""
    if isinstance(value, Mapping):
        return tuple((name, shapes_of(item)) for name, item in value.items())
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else repr(value)
