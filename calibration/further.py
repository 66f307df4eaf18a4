"""Inputs of the modulation for many more conditions than are drawn.

Modulation reads one vector a sample, made of the timestep and of pooled text or a class label, and the few conditions that are
drawn show few of its directions. What else the vector could be is to be had without drawing: of further conditions the pipeline
makes the denoiser's first call, which is read before it runs. The model then runs on these vectors beside small made-up
pictures, since no modulation sees a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditq.calibration.batches import batch_size, joined, moved
from ditq.calibration.record import RecordedCall, Trajectories, conditions_digest
from ditq.calibration.sampling import DenoiserCall, SamplingSettings, sample_one
from ditq.calibration.storage import write_tensors
from ditq.errors import DitqError
from ditq.families import Family
from ditq.graph import DiTGraph
from ditq.parts import InputGroup
from ditq.progress import ProgressSetting, progress_bar
from ditq.safetensors_files import TensorFile

FILE = "further.safetensors"
STEPS = 5  # of a trajectory, for which a condition's vectors are read
BATCH = 64  # samples run together
SAME = 0.02  # relative difference up to which an input is the same beside other tokens; half precision rounds to 0.004


class TakesRows(Protocol):
    """What adds up rows [R, C] of an input, each call in one bin; False where a value is not finite."""

    def add(self, rows: Tensor, number: int) -> bool: ...


@dataclass(frozen=True, eq=False)
class FurtherConditions:
    """Of K conditions, those that were drawn first.

    vectors: argument of the denoiser -> what it is [K, R, ...], for the R samples that each step needs.
    """

    trajectories: Trajectories
    vectors: Mapping[str, Tensor]
    digest: str

    @classmethod
    def of(cls, trajectories: Trajectories) -> FurtherConditions | None:
        """Those beside the recorded calls; None where there are none.

        Raises:
            DitqError: the file is damaged or of another recording.
        """
        path = trajectories.folder / FILE
        if not path.exists():
            return None
        try:
            file = TensorFile.open(path)
        except DitqError as error:
            raise DitqError(f"{path}: damaged; make it anew with ditq calibrate --resume") from error
        told = _metadata(file)
        if told.get("recording") != _recording(trajectories):
            raise DitqError(f"{path}: belongs to another recording; calibrate again")
        vectors = {name: file.read(name) for name in file.tensors}
        known = next(trajectories.calls()).arguments
        if (
            not vectors
            or not vectors.keys() <= known.keys()
            or len({value.shape[:2] for value in vectors.values()}) > 1
            or any(value.shape[2:] != known[name].shape[1:] for name, value in vectors.items())
        ):
            raise DitqError(f"{path}: damaged; calibrate again")
        if trajectories.widened:
            half = (torch.bfloat16, torch.float16)
            vectors = {name: value.float() if value.dtype in half else value for name, value in vectors.items()}
        return cls(trajectories, vectors, str(told.get("conditions_sha256")))

    @property
    def count(self) -> int:
        """K, with the conditions that were drawn."""
        return len(next(iter(self.vectors.values())))

    def without(self, conditions: Collection[int]) -> FurtherConditions:
        """The same without some of those that were drawn, by number."""
        kept = [number for number in range(self.count) if number not in conditions]
        return replace(self, vectors={name: value[kept] for name, value in self.vectors.items()})

    def groups(self, graph: DiTGraph, among: Collection[InputGroup], device: torch.device) -> set[str]:
        """The names of those inputs that a call's vectors decide, whatever the tokens are: told by running one recorded call
        and once more its vectors beside made-up tokens."""
        found = [group.name for group in among if all(graph.sites[site].role == "modulation" for site in group.sites)]
        call = next(self.trajectories.calls())
        size = batch_size(call.arguments)
        with torch.no_grad():
            whole = _inputs(graph, found, moved(call.arguments, device))
            given = {
                **{name: call.arguments[name] for name in self.vectors},
                "timestep": self._timesteps(call.step, size),
            }
            alone = _inputs(graph, found, _beside_made_up(graph, given, size, device))
        return {name for name in whole.keys() & alone.keys() if _alike(alone[name][:size], whole[name])}

    @torch.no_grad()
    def read(self, graph: DiTGraph, inputs: Mapping[str, TakesRows], bins: int, device: torch.device) -> None:
        """Hand the accumulators what their inputs are, each condition at `STEPS` of the steps, all conditions at some.

        Raises:
            DitqError: a value that is not finite.
        """
        for step, rows in self._calls() if inputs else ():
            given = {**rows, "timestep": self._timesteps(step, len(next(iter(rows.values()))))}
            size = len(given["timestep"])
            seen = _inputs(graph, inputs, _beside_made_up(graph, given, size, device))
            for name, x in seen.items():
                if not inputs[name].add(x[:size].reshape(-1, x.shape[-1]), self.trajectories.bin_of(step, bins)):
                    raise DitqError(
                        f"{name}: its input is not finite at step {step}; the checkpoint or its number format overflows"
                    )

    def _calls(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(step, rows of each argument) of at most `BATCH` samples, first step first."""
        every = max(1, min(self.trajectories.steps // STEPS, self.count))
        for step in range(self.trajectories.steps):
            chosen = {name: value[step % every :: every].flatten(0, 1) for name, value in self.vectors.items()}
            for start in range(0, len(next(iter(chosen.values()))), BATCH):
                yield step, {name: value[start : start + BATCH] for name, value in chosen.items()}

    def _timesteps(self, step: int, count: int) -> Tensor:
        values = self.trajectories.timestep_arguments
        assert values is not None  # record_further looked
        first = next(self.trajectories.calls()).arguments["timestep"]
        return torch.full((count,), values[step], dtype=first.dtype)


def record_further(
    family: Family | None,
    pipeline: Any,
    conditions: Sequence[str | int],
    settings: SamplingSettings,
    trajectories: Trajectories,
    progress: ProgressSetting = None,
) -> None:
    """Write the vectors of these conditions and of those that were drawn beside the recorded calls.

    Nothing is written where there are no further conditions, where the family has no argument of one vector a sample but the
    time, and where recorded calls do not tell what guidance's other calls get. A file of the same conditions stays.
    """
    path = trajectories.folder / FILE
    digest = conditions_digest([*trajectories.conditions, *conditions])
    told = {"conditions_sha256": digest, "recording": _recording(trajectories)}
    with suppress(DitqError):  # a damaged one is made anew
        if path.exists() and _metadata(TensorFile.open(path)) == told:
            return
    path.unlink(missing_ok=True)
    drawn = _vectors_of_drawn(family, trajectories) if conditions and family is not None else None
    if drawn is None:
        return
    others, found = drawn
    with progress_bar("reading further conditions", len(conditions), progress) as bar:
        for number, condition in enumerate(conditions, start=len(found)):
            first = _first_call(pipeline, condition, settings, number)
            found.append({name: torch.cat((first[name].cpu(), rest)) for name, rest in others.items()})
            bar.advance()
    tensors = {name: torch.stack([one[name] for one in found]).contiguous() for name in others}
    write_tensors(path, tensors, told)


def vector_arguments(family: Family) -> list[str]:
    """Arguments of the denoiser that are a number or a vector a sample and stay as they are from step to step."""
    return [
        name
        for name, (first, *rest) in family.axes.items()
        if first == "batch" and len(rest) < 2 and not any(rest) and name not in family.changing and "." not in name
    ]


def _vectors_of_drawn(
    family: Family, trajectories: Trajectories
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]] | None:
    """(what the calls behind a step's first one get, for all conditions; all of it [R, ...] for each condition), by argument;
    None where further conditions cannot be told by their first calls."""
    calls = list(_first_steps(trajectories))
    names = [name for name in vector_arguments(family) if isinstance(calls[0][0].arguments.get(name), Tensor)]
    if not names or trajectories.timestep_arguments is None:
        return None
    found = [{name: torch.cat([call.arguments[name] for call in step]) for name in names} for step in calls]
    if all(torch.equal(step[name], found[0][name]) for step in found for name in names):
        return None  # they are no matter of the condition, as guidance is none, or a single one does not tell
    first = batch_size(calls[0][0].arguments)
    others = {name: value[first:] for name, value in found[0].items()}
    same = all(torch.equal(step[name][first:], others[name]) for step in found for name in names)
    return (others, found) if same else None


def _first_steps(trajectories: Trajectories) -> Iterator[list[RecordedCall]]:
    """The calls of each condition's first step."""
    chosen = frozenset(number for number, (_, step) in enumerate(trajectories.places_of_calls()) if step == 0)
    for _, calls in groupby(trajectories.calls(chosen=chosen), key=lambda call: call.condition):
        yield list(calls)


class _Seen(Exception):
    """Ends a pipeline's call once its denoiser has been called."""


def _first_call(pipeline: Any, condition: str | int, settings: SamplingSettings, number: int) -> dict[str, Any]:
    """The arguments of the denoiser's first call for a condition; it does not run."""
    found: list[dict[str, Any]] = []

    def take(call: DenoiserCall) -> None:
        found.append(call.arguments)
        raise _Seen

    with suppress(_Seen):
        sample_one(pipeline, condition, settings, number, on_denoiser_call=take, decode=False)
    return found[0]


def _beside_made_up(graph: DiTGraph, given: Mapping[str, Tensor], size: int, device: torch.device) -> dict[str, Any]:
    """The graph's example inputs, as many samples as `given` has or a few more, with its rows in their place."""
    example = moved(graph.example_inputs, device, next(graph.model.parameters()).dtype)
    call = joined([example] * -(-size // batch_size(example)))
    short = batch_size(call) - size
    for name, rows in moved(dict(given), device).items():
        call[name] = torch.cat((rows, rows[-1:].expand(short, *rows.shape[1:]))) if short else rows
    return call


def _inputs(graph: DiTGraph, names: Collection[str], call: Mapping[str, Any]) -> dict[str, Tensor]:
    """What these inputs are in a call; not there where the call leaves them out."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: seen.__setitem__(name, given[0])

    with ExitStack() as hooks:
        for name in names:
            site = graph.linear(graph.groups[name].sites[0])
            hooks.callback(site.register_forward_pre_hook(hook(name)).remove)
        graph.model(**call)
    return seen


def _recording(trajectories: Trajectories) -> str:
    """SHA-256 over what the recorded calls were drawn of and with."""
    return hashlib.sha256(json.dumps(trajectories.index, sort_keys=True).encode()).hexdigest()


def _metadata(file: TensorFile) -> dict[str, Any]:
    """What the file says of itself. Raises DitqError where it says nothing."""
    try:
        told = json.loads(file.metadata["ditq"])
    except (KeyError, ValueError) as error:
        raise DitqError(f"{file.path}: not written by ditq; calibrate again") from error
    return told if isinstance(told, dict) else {}


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one.float() - other.float()).norm() <= SAME * other.float().norm())
