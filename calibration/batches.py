"""Recorded calls of the denoiser, a sample of them over all conditions and steps, joined into batches to be run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditq.calibration.record import RecordedCall, Trajectories


@dataclass(frozen=True, eq=False)
class CallBatch:
    """Calls run as one: the denoiser's arguments, and the scheduler step int64 [B] that each sample belongs to."""

    arguments: dict[str, Any]
    steps: Tensor


def sampled_batches(trajectories: Trajectories, samples: int, batch: int, seed: int = 0) -> list[CallBatch]:
    """About `samples` samples in batches of at most `batch`: evenly from all steps, mixed in every batch.

    A call counts for as many samples as it has rows: a pipeline may run both guidance branches in one call. Only calls
    whose arguments have the same shapes are joined. The same seed gives the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = trajectories.steps_of_calls()
    mixed = torch.randperm(len(steps), generator=generator).tolist()
    by_step = sorted(mixed, key=steps.__getitem__)  # the calls of a step stay mixed
    size = batch_size(next(trajectories.calls(chosen={0})).arguments)
    wanted = min(len(steps), max(1, samples // size))
    chosen = [by_step[index * len(steps) // wanted] for index in range(wanted)]
    found = dict(zip(sorted(chosen), trajectories.calls(chosen=frozenset(chosen)), strict=True))
    waiting: dict[Any, list[RecordedCall]] = {}
    batches = []
    for number in [number for number in mixed if number in found]:
        key = _shapes(found[number].arguments)
        calls = waiting.setdefault(key, [])
        calls.append(found[number])
        if (len(calls) + 1) * size > batch:
            batches.append(_batch(waiting.pop(key)))
    return batches + [_batch(rest) for rest in waiting.values()]


def batch_size(arguments: Mapping[str, Any]) -> int:
    """Samples in a call: the first dimension of its first tensor, the latents."""
    return next(value.shape[0] for value in arguments.values() if isinstance(value, Tensor))


def joined(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One call for several whose arguments have the same shapes: tensors with a row a sample one after the other.

    What is not by sample (position ids, settings) is taken from the first call.
    """
    size = batch_size(calls[0])
    return {name: _joined([call[name] for call in calls], size) for name in calls[0]}


def _batch(calls: Sequence[RecordedCall]) -> CallBatch:
    steps = [torch.full((batch_size(call.arguments),), call.step) for call in calls]
    return CallBatch(joined([call.arguments for call in calls]), torch.cat(steps))


def _joined(values: Sequence[Any], size: int) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values], size) for name in first}
    if isinstance(first, Tensor) and first.dim() and first.shape[0] == size:
        return torch.cat(list(values))
    return first


def _shapes(value: Any) -> Any:
    """What calls must have in common to be joined."""
    if isinstance(value, Mapping):
        return tuple((name, _shapes(item)) for name, item in value.items())
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else repr(value)
