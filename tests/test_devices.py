"""Where a model runs, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from ditq.calibration.calibrate import calibrate
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.devices import FILLED, bytes_of, device_of, dtype_on, place_pipeline
from ditq.errors import DitqError
from ditq.report.evaluate import evaluate
from tests.command_line import assert_refused
from tests.small_checkpoint import write_pipeline


def test_a_gpu_is_taken_where_there_is_one() -> None:
    found = device_of("auto")
    assert found.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert dtype_on(torch.device("cpu")) == torch.float32 and dtype_on(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:99", "cuda:-3", ""])
def test_what_is_no_device_here_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(DitqError, match="device"):
        device_of(name)


@pytest.mark.parametrize("command", ["calibrate", "compile"])
def test_a_gpu_that_is_not_there_is_said_before_anything_is_done(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "torch sees", command, "mini", "-o", tmp_path / "out", "--device", "cuda:99")
    assert not any(tmp_path.iterdir())


def calibrated(place: Path, device: str, free: int | None, monkeypatch: pytest.MonkeyPatch) -> Statistics:
    """Statistics of a small pipeline on a device of which so many bytes are free."""
    monkeypatch.setattr(
        "ditq.calibration.calibrate.place_pipeline", lambda pipeline, device: place_pipeline(pipeline, device, free)
    )
    checkpoint = write_pipeline(place.with_name(f"{place.name}-pipeline"))
    return calibrate(
        checkpoint, place, ["red apple", "blue fish"], 2, dtype=torch.float32, device=device, progress=False
    )


def test_what_does_not_fit_comes_when_it_runs(tmp_path: Path) -> None:
    """The text encoders first; the transformer where it does not fit either."""
    checkpoint = Checkpoint.open(write_pipeline(tmp_path / "pipeline"))
    cpu = torch.device("cpu")
    for free, by_layers, by_blocks in ((10**12, False, False), (6_000_000, True, False), (1000, True, True)):
        pipeline = checkpoint.load_pipeline()
        sizes = {name: bytes_of(part) for name, part in pipeline.components.items() if hasattr(part, "parameters")}
        kept = sizes["transformer"] + sizes["vae"]
        assert kept < FILLED * 6_000_000 < sum(sizes.values()), sizes
        assert place_pipeline(pipeline, cpu, free) == by_blocks == _is_group_offload_enabled(pipeline.transformer)
        assert _is_group_offload_enabled(pipeline.text_encoder) == by_layers
        assert not _is_group_offload_enabled(pipeline.vae)


@pytest.mark.parametrize("free", [6_000_000, 1000])
def test_statistics_are_the_same_where_parts_come_when_they_run(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrated(tmp_path / "whole", "cpu", None, monkeypatch)
    found = calibrated(tmp_path / "parts", "cpu", free, monkeypatch)
    assert found.groups.keys() == expected.groups.keys()
    for name in expected.groups:
        assert torch.equal(found.groups[name].hessian(), expected.groups[name].hessian()), name


def test_an_original_that_comes_block_by_block_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(write_pipeline(tmp_path / "pipeline"))
    monkeypatch.setattr(
        "ditq.report.evaluate.place_pipeline", lambda pipeline, device: place_pipeline(pipeline, device, 1000)
    )
    found = evaluate(checkpoint.load_model(), checkpoint, limit=1, device="cpu", progress=False)
    assert max(step.forced for step in found.steps) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("free", [None, 6_000_000, 1000])
def test_statistics_of_a_gpu_are_those_of_the_cpu(
    free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        calibrated(tmp_path / device, device, free if device == "cuda" else None, monkeypatch)
        for device in ("cpu", "cuda")
    ]
    for name, expected in found[0].groups.items():
        got = found[1].groups[name].hessian()
        assert float((got - expected.hessian()).norm() / expected.hessian().norm()) < 1e-2


def test_a_gpu_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 8 GiB")

    monkeypatch.setattr(Checkpoint, "open", full)
    assert_refused(
        capsys, "not enough memory on the GPU: CUDA out of memory.* 2.00 GiB. Give --device cpu", "inspect", "mini"
    )
