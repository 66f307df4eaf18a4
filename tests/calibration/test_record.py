"""Recorded trajectories replay exactly, survive an interruption, and refuse what they do not belong to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditq.calibration.record import Trajectories, record_trajectories
from ditq.calibration.sampling import SamplingSettings
from ditq.errors import DitqError
from tests.calibration.small_pipelines import (
    ARGUMENTS,
    CONDITIONS,
    FAMILIES,
    STEPS,
    mini,
    pipeline_of,
    saved_checkpoint,
)

SETTINGS = SamplingSettings(ARGUMENTS["flux"], seed=5)


def record(folder: Path, **changes: Any) -> Trajectories:
    arguments = {"conditions": CONDITIONS["flux"], "settings": SETTINGS, "folder": folder, **changes}
    return record_trajectories(mini(), pipeline=pipeline_of("flux"), **arguments)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording") / "trajectories"
    record(folder)
    return folder


@pytest.fixture
def copy(recording: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recording, tmp_path / "copy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_gives_the_very_outputs_that_the_pipeline_got(family: str, tmp_path: Path) -> None:
    pipeline, outputs = pipeline_of(family), []
    hook = pipeline.transformer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].clone()))
    try:
        checkpoint = saved_checkpoint(family, tmp_path / "checkpoint")
        settings = SamplingSettings(ARGUMENTS[family], seed=5)
        trajectories = record_trajectories(
            checkpoint, CONDITIONS[family], settings, tmp_path / "trajectories", pipeline=pipeline
        )
    finally:
        hook.remove()
    calls = list(trajectories.calls())
    assert len(calls) == len(outputs) == trajectories.count() > 0
    for call, output in zip(calls, outputs, strict=True):
        assert torch.equal(pipeline.transformer(**call.arguments)[0], output)
    assert [call.condition for call in calls] == sorted(call.condition for call in calls)
    assert trajectories.steps == STEPS
    assert {call.timestep for call in calls} == set(trajectories.timesteps)


def test_arguments_come_back_as_they_were_given(recording: Path) -> None:
    given: list[dict[str, Any]] = []

    def keep(module: torch.nn.Module, positional: Any, named: dict[str, Any]) -> None:
        given.append(named)

    pipeline = pipeline_of("flux")
    hook = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    generator = torch.Generator().manual_seed(5)
    pipeline(CONDITIONS["flux"][0], generator=generator, output_type="latent", **ARGUMENTS["flux"])
    hook.remove()
    recorded = [call.arguments for call in Trajectories.open(recording).calls() if call.condition == 0]
    for arguments, named in zip(recorded, given, strict=True):
        assert list(arguments) == [name for name in arguments if name in named] and arguments.keys() == named.keys()
        for name, value in named.items():
            if isinstance(value, torch.Tensor):
                assert arguments[name].dtype == value.dtype
                assert torch.equal(arguments[name], value)
            else:
                assert arguments[name] == value


def test_a_tensor_that_does_not_change_is_stored_once(recording: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(recording / "00000.safetensors"), framework="pt") as file:
        names = list(file.keys())
    assert sorted(name for name in names if name.endswith("_ids")) == ["0000.img_ids", "0000.txt_ids"]
    assert [name for name in names if name.endswith("encoder_hidden_states")] == [
        "0000.encoder_hidden_states",
        "0001.encoder_hidden_states",
    ]


def test_a_stride_keeps_whole_steps(recording: Path) -> None:
    trajectories = Trajectories.open(recording)
    assert [(call.condition, call.step) for call in trajectories.calls(stride=2)] == [(0, 0), (0, 0), (1, 0), (1, 0)]
    assert trajectories.count(stride=2) == 4
    with pytest.raises(DitqError, match="stride is 0"):
        next(trajectories.calls(stride=0))


def test_bins_divide_the_steps_equally(recording: Path) -> None:
    trajectories = Trajectories.open(recording)
    trajectories.__dict__["_records"] = [{"timesteps": [0.0] * 20}]
    assert [trajectories.bin_of(step, 4) for step in range(20)] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


def test_a_resumed_recording_is_the_uninterrupted_one_bit_by_bit(recording: Path, tmp_path: Path) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done == STEPS + 1:
            raise KeyboardInterrupt

    folder = tmp_path / "trajectories"
    with pytest.raises(KeyboardInterrupt):
        record(folder, progress=interrupt)
    assert sorted(files_of(folder)) == ["00000.safetensors", "trajectories.json"]
    with pytest.raises(DitqError, match="condition 1 of 2 is not recorded yet"):
        Trajectories.open(folder)
    with pytest.raises(DitqError, match="exists already"):
        record(folder)
    record(folder, resume=True)
    assert files_of(folder) == files_of(recording)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": SamplingSettings(ARGUMENTS["flux"], seed=6)}, "another seed"),
        ({"settings": SamplingSettings({**ARGUMENTS["flux"], "num_inference_steps": 3}, seed=5)}, "other arguments"),
        ({"conditions": ["a", "b"]}, "other conditions"),
    ],
)
def test_resuming_with_other_settings_is_refused(copy: Path, changes: dict[str, Any], words: str) -> None:
    before = files_of(copy)
    with pytest.raises(DitqError, match=f"was recorded with {words}"):
        record(copy, resume=True, **changes)
    assert files_of(copy) == before


def test_arguments_that_cannot_be_written_down_are_refused(tmp_path: Path) -> None:
    settings = SamplingSettings({**ARGUMENTS["flux"], "latents": torch.zeros(1, 64, 32)})
    with pytest.raises(DitqError, match="a sampling argument cannot be written down"):
        record(tmp_path / "trajectories", settings=settings)
    assert not (tmp_path / "trajectories").exists()


def truncate(folder: Path) -> None:
    path = folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def swap(folder: Path) -> None:
    shutil.copy(folder / "00000.safetensors", folder / "00001.safetensors")


def edit(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "trajectories.json").read_text())
        (folder / "trajectories.json").write_text(json.dumps({**index, key: value}))

    return change


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The first file with its own record of what was called changed."""

    def apply(folder: Path) -> None:
        path = folder / "00000.safetensors"
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["ditq"])
        change(record)
        save_file(load_file(path), path, metadata={"ditq": json.dumps(record)})

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "00001.safetensors: damaged"),
        (swap, "does not belong to this recording"),
        (lambda folder: (folder / "trajectories.json").unlink(), "no recorded trajectories here"),
        (lambda folder: (folder / "trajectories.json").write_text("{"), "not valid JSON"),
        (edit("format", "other"), "not written by ditq"),
        (edit("version", 99), "has format version 99, this ditq reads 1"),
        (edit("conditions", []), "incomplete"),
        (edit("dtype", "x"), "incomplete"),
        (rewrite(lambda record: record.pop("timesteps")), "not a recorded trajectory"),
        (rewrite(lambda record: record["calls"][0].pop("step")), "not a recorded trajectory"),
        (rewrite(lambda record: record["calls"][0].update(arguments=None)), "not a recorded trajectory"),
        (
            rewrite(lambda record: record["calls"][-1].update(step=99)),
            "does not belong to this recording or is damaged",
        ),
    ],
)
def test_a_damaged_recording_is_named(copy: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(copy)
    with pytest.raises(DitqError) as caught:
        Trajectories.open(copy)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recording_of_another_checkpoint_is_refused(recording: Path) -> None:
    assert Trajectories.open(recording, mini().fingerprint()).conditions == CONDITIONS["flux"]
    with pytest.raises(DitqError, match="recorded with another checkpoint"):
        Trajectories.open(recording, "0" * 64)
