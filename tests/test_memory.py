"""Free memory within a container's limits, and tensors that stand on disk in place of memory."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditq.calibration.calibrate import calibrate
from ditq.checkpoint import Checkpoint
from ditq.memory import LEAST_FREE, SMALL, copied, free_memory, on_disk
from tests.command_line import assert_refused
from tests.small_checkpoint import write_pipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("folder", "limit", "used"),
    [(".", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")],
)
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, folder: str, limit: str, used: str) -> None:
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / used).write_text("3000000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000000\n")
    (group / limit).write_text("8000000000\n")
    assert free_memory(CPU, tmp_path) in (5_500_000_000, free_memory(CPU, tmp_path / "none"))
    (group / limit).write_text("3500000000\n")
    assert free_memory(CPU, tmp_path) == LEAST_FREE
    (group / limit).write_text("max\n")
    assert free_memory(CPU, tmp_path) >= LEAST_FREE


def mapped(folder: Path) -> list[str]:
    """Files of the folder that this process sees as memory."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tensor_on_disk_can_be_changed_and_leaves_nothing(tmp_path: Path) -> None:
    values = torch.randn(SMALL // 4 + 1)
    found = on_disk(values, tmp_path, torch.float32)
    assert torch.equal(found, values) and len(mapped(tmp_path)) == 1 and not list(tmp_path.iterdir())
    found.mul_(2)
    assert torch.equal(found, 2 * values)
    small = values[:4]
    assert on_disk(small, tmp_path, torch.float32) is small
    for dtype in (torch.bfloat16, torch.int8):
        assert torch.equal(on_disk(values.repeat(4), tmp_path, dtype), values.repeat(4).to(dtype))
    del found
    gc.collect()
    assert not mapped(tmp_path)


def test_a_model_is_larger_than_memory_where_it_takes_over_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(write_pipeline(tmp_path / "pipeline"))
    size = 4 * sum(parameter.numel() for parameter in checkpoint.load_model().parameters())
    for free, larger in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr("ditq.checkpoint.free_memory", lambda _, free=free: free)
        assert checkpoint.larger_than_memory == larger


def test_a_model_on_disk_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditq.memory.SMALL", 1)
    checkpoint = Checkpoint.open(write_pipeline(tmp_path / "pipeline"))
    (folder := tmp_path / "weights").mkdir()
    model, offloaded = checkpoint.load_model(), checkpoint.load_model(offload=folder)
    assert len(mapped(folder)) == len(list(model.parameters()))
    for (name, wanted), found in zip(model.state_dict().items(), offloaded.state_dict().values(), strict=True):
        assert torch.equal(wanted, found), name


def test_a_copy_of_a_model_on_disk_stands_there_too_and_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.memory.SMALL", 1)
    checkpoint = Checkpoint.open(write_pipeline(tmp_path / "pipeline"))
    (folder := tmp_path / "weights").mkdir()
    model = checkpoint.load_model(offload=folder)
    held = len(mapped(folder))
    copy = copied(model)
    assert held and len(mapped(folder)) == 2 * held and not list(folder.iterdir())
    parameters = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        assert torch.equal(parameter, parameters[name]) and parameter.requires_grad == parameters[name].requires_grad
        parameter.add_(1)  # as passes do in place
        assert not torch.equal(parameter, parameters[name]), name
    again = copied(copied(checkpoint.load_model()))  # of what is in memory, a plain copy
    assert len(mapped(folder)) == 2 * held and all(
        torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items()
    )


_WITHIN = """
import resource, sys, torch
from pathlib import Path
from ditq.memory import on_disk
taken = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (taken + (64 << 20),) * 2)
ones, folder = torch.ones(4 << 20), Path(sys.argv[1])
held = [on_disk(ones, folder, ones.dtype) if sys.argv[2] == "disk" else ones.clone() for _ in range(16)]
print(sum(float(part.sum()) for part in held))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit what is not of files")
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_more_than_memory_fits_on_disk(tmp_path: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHIN, str(tmp_path), where], capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (where == "disk"), done.stderr


def test_a_full_disk_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pipeline = write_pipeline(tmp_path / "pipeline")
    calibrate(pipeline, tmp_path / "stats", ["red apple"], 1, progress=False)
    monkeypatch.setattr("ditq.memory.SMALL", 1)
    monkeypatch.setattr("os.posix_fallocate", full)
    command = ("compile", pipeline, "-o", tmp_path / "engine", "--stats", tmp_path / "stats", "--offload", "disk")
    assert_refused(capsys, "No space left.*free some space", *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "stats"]
