"""Where a model runs, and what is said where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditq.calibration.calibrate import calibrate
from ditq.checkpoint import Checkpoint
from ditq.devices import device_of, dtype_on
from ditq.errors import DitqError
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_statistics_of_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    checkpoint = write_pipeline(tmp_path / "pipeline")
    prompts = ["red apple", "blue fish"]
    found = [
        calibrate(checkpoint, tmp_path / device, prompts, 2, dtype=torch.float32, device=device, progress=False)
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
