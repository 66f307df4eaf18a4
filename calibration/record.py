"""Trajectories on disk: every input that the denoiser really got while samples were drawn, to be replayed exactly.

One safetensors file a condition. Its metadata says for each call which scheduler step it belongs to and how its
arguments are put together from the file's tensors and from constants; a tensor that an earlier call had already (text
embeddings, position ids) is stored once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ditq.calibration.sampling import (
    DenoiserCall,
    Sample,
    SamplingSettings,
    check_arguments,
    check_conditions,
    condition_kind,
    expected_steps,
    sample_one,
)
from ditq.calibration.storage import ditq_version, make_folder, tensor_digest, write_json, write_tensors
from ditq.checkpoint import Checkpoint, read_json
from ditq.errors import DitqError
from ditq.progress import ProgressSetting, progress_bar
from ditq.safetensors_files import TensorFile

INDEX = "trajectories.json"
FORMAT = "ditq trajectories"
FORMAT_VERSION = 1


class RecordedCall(NamedTuple):
    """One call of the denoiser: its arguments, the scheduler's timestep, the step's number, the condition's index."""

    arguments: dict[str, Any]
    timestep: float
    step: int
    condition: int


@dataclass(frozen=True)
class Trajectories:
    """A folder of recorded trajectories, one for each condition. widened: half precision comes as float32."""

    folder: Path
    index: dict[str, Any]
    widened: bool = False

    @classmethod
    def open(cls, folder: str | Path, fingerprint: str | None = None) -> Trajectories:
        """Open a finished recording; with `fingerprint`, of that checkpoint only.

        Raises DitqError for a folder that is no recording, is not finished, damaged or of another checkpoint.
        """
        folder = Path(folder)
        trajectories = cls(folder, _read_index(folder))
        if fingerprint is not None and trajectories.fingerprint != fingerprint:
            raise DitqError(f"{folder}: recorded with another checkpoint; calibrate this one again")
        for number in range(len(trajectories.conditions)):
            if not trajectories.file(number).exists():
                raise DitqError(
                    f"{folder}: condition {number} of {len(trajectories.conditions)} is not recorded yet; "
                    "go on with --resume"
                )
        steps = {len(record["timesteps"]) for record in trajectories._records}
        if len(steps) != 1:
            raise DitqError(f"{folder}: its conditions have different numbers of steps; record it again")
        return trajectories

    def in_float32(self) -> Trajectories:
        """The same for a model in float32, as passes change it, whatever it was that drew the pictures."""
        return replace(self, widened=True)

    @property
    def conditions(self) -> list[str] | list[int]:
        """The prompts or class labels."""
        return self.index["conditions"]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint that they were recorded with."""
        return self.index["checkpoint"]["fingerprint"]

    @property
    def dtype(self) -> torch.dtype:
        """What the model drew in, and so what latents were rounded to."""
        return getattr(torch, self.index["dtype"])

    @property
    def steps(self) -> int:
        """Scheduler steps of each trajectory."""
        return len(self._records[0]["timesteps"])

    @property
    def timesteps(self) -> list[float]:
        """The scheduler's timestep at each step."""
        return self._records[0]["timesteps"]

    @cached_property
    def timestep_arguments(self) -> list[float] | None:
        """What the denoiser gets as its argument `timestep` at each step, in the unit of its pipeline; None without one."""
        found: dict[int, float] = {}
        for call in self.calls():
            if call.condition > 0:
                break
            value = call.arguments.get("timestep")
            if isinstance(value, torch.Tensor):
                found.setdefault(call.step, float(value.reshape(-1)[0]))
        return [found[step] for step in range(self.steps)] if len(found) == self.steps else None

    def bin_of(self, step: int, bins: int) -> int:
        """The timestep bin of a step: the trajectory's steps divided equally into `bins`, first step in bin 0."""
        return step * bins // self.steps

    def count(self, stride: int = 1) -> int:
        """The number of calls that `calls(stride)` gives."""
        return sum(call["step"] % stride == 0 for record in self._records for call in record["calls"])

    def steps_of_calls(self) -> list[int]:
        """The scheduler step of every call, in the order of the recording."""
        return [call["step"] for record in self._records for call in record["calls"]]

    def places_of_calls(self) -> list[tuple[int, int]]:
        """(condition, scheduler step) of every call, in the order of the recording."""
        return [(number, call["step"]) for number, record in enumerate(self._records) for call in record["calls"]]

    def calls(self, stride: int = 1, chosen: Collection[int] | None = None) -> Iterator[RecordedCall]:
        """Every call in the order of the recording, of each `stride`-th step only; all its guidance branches.

        chosen: numbers of calls in the recording; only these are read.
        """
        if stride < 1:
            raise DitqError(f"stride is {stride}; give at least 1")
        number = -1
        for condition, record in enumerate(self._records):
            path = self.file(condition)
            if chosen is not None and not any(number + 1 + i in chosen for i in range(len(record["calls"]))):
                number += len(record["calls"])
                continue
            try:
                with safe_open(str(path), framework="pt") as tensors:
                    for call in record["calls"]:
                        number += 1
                        if call["step"] % stride == 0 and (chosen is None or number in chosen):
                            unpack = partial(_unpack, tensors=tensors, widened=self.widened)
                            arguments = {name: unpack(kind) for name, kind in call["arguments"].items()}
                            timestep = record["timesteps"][call["step"]]
                            yield RecordedCall(arguments, timestep, call["step"], condition)
            except (SafetensorError, OSError) as error:
                raise DitqError(f"{path}: damaged ({error}); record it again") from error

    def file(self, condition: int) -> Path:
        """The file of the condition with this index."""
        return self.folder / f"{condition:05d}.safetensors"

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        return [self._read_record(number) for number in range(len(self.conditions))]

    def _read_record(self, number: int) -> dict[str, Any]:
        """The metadata of one file, checked: the right condition, all its tensors there."""
        path = self.file(number)
        file = TensorFile.open(path)
        try:
            record = json.loads(file.metadata["ditq"])
            same = record["condition"] == self.conditions[number] and record["seed"] == self.index["seed"] + number
            names = {name for call in record["calls"] for name in _tensor_names(call["arguments"].values())}
            same = same and all(0 <= call["step"] < len(record["timesteps"]) for call in record["calls"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DitqError(f"{path}: not a recorded trajectory; record it again") from error
        if not same or not names <= set(file.tensors):
            raise DitqError(f"{path}: does not belong to this recording or is damaged; record it again")
        return record


def record_trajectories(
    checkpoint: Checkpoint,
    conditions: Sequence[str | int],
    settings: SamplingSettings,
    folder: str | Path,
    progress: ProgressSetting = None,
    *,
    resume: bool = False,
    pipeline: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Trajectories:
    """Draw a sample for each condition with the checkpoint's pipeline and write what the denoiser got into `folder`.

    Each finished condition is one file that appears whole. With `resume`, files of an interrupted recording with the
    same settings are kept and the rest is recorded as if there had been no interruption. `pipeline` is the checkpoint's
    pipeline where it is loaded already. Raises DitqError for conditions or arguments that the pipeline does not take,
    for a folder in use, for latents that are not finite, and when the files cannot be written.
    """
    folder = Path(folder)
    pipeline = checkpoint.load_pipeline(dtype=dtype) if pipeline is None else pipeline
    check_arguments(pipeline, settings.arguments)
    check_conditions(pipeline, conditions)
    index = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "ditq": ditq_version(),
        "checkpoint": {
            "name": checkpoint.name,
            "class": checkpoint.class_name,
            "fingerprint": checkpoint.fingerprint(),
        },
        "pipeline": type(pipeline).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "kind": condition_kind(pipeline),
        "conditions": list(conditions),
        "conditions_sha256": conditions_digest(conditions),
        "arguments": dict(settings.arguments),
        "seed": settings.seed,
    }
    trajectories = Trajectories(folder, index)
    done = _finished(trajectories, resume)
    steps = expected_steps(pipeline, settings)
    with progress_bar("recording trajectories", len(conditions) * steps, progress) as bar:
        for number, condition in enumerate(conditions):
            if number not in done:
                recorder = _Recorder()
                sample = sample_one(
                    pipeline,
                    condition,
                    settings,
                    number,
                    on_denoiser_call=recorder.add,
                    on_step=lambda step: bar.advance(1 if step.step < steps else 0),
                    decode=False,
                )
                record = recorder.record(condition, settings.seed + number, sample)
                write_tensors(trajectories.file(number), recorder.tensors, record)
            bar.advance_to((number + 1) * steps)
    return Trajectories.open(folder)


def conditions_digest(conditions: Sequence[str | int]) -> str:
    """SHA-256 over the list of prompts or labels."""
    return hashlib.sha256(json.dumps(list(conditions), ensure_ascii=False).encode()).hexdigest()


class _Recorder:
    """Takes in the calls of one sample."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._calls: list[dict[str, Any]] = []
        self._seen: dict[tuple[Any, ...], str] = {}

    def add(self, call: DenoiserCall) -> None:
        arguments = {name: self._pack(value, call.call, name) for name, value in call.arguments.items()}
        self._calls.append({"step": call.step, "arguments": arguments})

    def record(self, condition: str | int, seed: int, sample: Sample) -> dict[str, Any]:
        if not self._calls or self._calls[-1]["step"] >= len(sample.steps):
            raise DitqError(f"drawing {condition!r}: the denoiser and the scheduler do not take turns; ditq needs that")
        timesteps = [step.timestep for step in sample.steps]
        return {"condition": condition, "seed": seed, "timesteps": timesteps, "calls": self._calls}

    def _pack(self, value: Any, call: int, name: str) -> dict[str, Any]:
        """How `value` is put together, see `_unpack`; its tensors are stored under "<call>.<name>"."""
        if isinstance(value, torch.Tensor):
            kept = value.detach().to("cpu", copy=True).contiguous()
            key = (name, kept.dtype, kept.shape, tensor_digest(kept))
            if key not in self._seen:
                self._seen[key] = f"{call:04d}.{name}"
                self.tensors[self._seen[key]] = kept
            return {"tensor": self._seen[key]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"constant": value}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self._pack(item, call, f"{name}.{key}") for key, item in value.items()}}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self._pack(item, call, f"{name}.{place}") for place, item in enumerate(value)]}
        raise DitqError(f"the denoiser's argument '{name}' is a {type(value).__name__}; ditq cannot record that")


def _unpack(packed: dict[str, Any], tensors: Any, widened: bool) -> Any:
    """The value that `_Recorder._pack` described; `tensors` is the opened file. widened: half precision becomes float32."""
    ((kind, content),) = packed.items()
    if kind == "tensor":
        tensor = tensors.get_tensor(content)
        return tensor.float() if widened and tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    if kind == "dict":
        return {key: _unpack(item, tensors, widened) for key, item in content.items()}
    if kind == "list":
        return [_unpack(item, tensors, widened) for item in content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors, widened) for item in content)
    return content


def _tensor_names(packed_values: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The names of all tensors that packed values refer to."""
    for packed in packed_values:
        ((kind, content),) = packed.items()
        if kind == "tensor":
            yield content
        elif kind == "dict":
            yield from _tensor_names(content.values())
        elif kind in ("list", "tuple"):
            yield from _tensor_names(content)


def _finished(trajectories: Trajectories, resume: bool) -> set[int]:
    """Prepare the folder and tell which conditions are recorded in it already."""
    folder, index = trajectories.folder, trajectories.index
    try:
        wanted = json.loads(json.dumps(index))
    except TypeError as error:
        raise DitqError(
            f"a sampling argument cannot be written down ({error}); give plain numbers and texts"
        ) from error
    if not folder.exists() or not any(folder.iterdir()):
        make_folder(folder)
        write_json(folder / INDEX, index)
        return set()
    if not resume:
        raise DitqError(f"{folder}: exists already; go on with --resume, or record again with --force")
    found = _read_index(folder)
    if found["checkpoint"].get("fingerprint") != index["checkpoint"]["fingerprint"]:
        raise DitqError(f"{folder}: was recorded with another checkpoint; start again with --force")
    different = [key for key in wanted if key not in ("ditq", "checkpoint") and wanted[key] != found.get(key)]
    if different:
        what = f"other {different[0]}" if different[0].endswith("s") else f"another {different[0]}"
        raise DitqError(f"{folder}: was recorded with {what}; give the same, or start again with --force")
    done = {number for number in range(len(trajectories.conditions)) if trajectories.file(number).exists()}
    for number in done:
        trajectories._read_record(number)
    return done


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise DitqError(f"{folder}: no recorded trajectories here (no {INDEX}); make them with `ditq calibrate`")
    index = read_json(path)
    if index.get("format") != FORMAT:
        raise DitqError(f"{path}: not written by ditq; give a folder made by `ditq calibrate`")
    if index.get("version") != FORMAT_VERSION:
        raise DitqError(
            f"{path}: has format version {index.get('version')}, this ditq reads {FORMAT_VERSION}; calibrate again"
        )
    missing = {"checkpoint", "dtype", "conditions", "arguments", "seed", "kind"} - set(index)
    drawn_in = None if missing else getattr(torch, str(index["dtype"]), None)
    if (
        missing
        or not isinstance(index["conditions"], list)
        or not index["conditions"]
        or not isinstance(drawn_in, torch.dtype)
    ):
        raise DitqError(f"{path}: incomplete; calibrate again")
    return index
