"""Sizes, memory and speed against cases whose answer is known beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.report import measure

MB = 1_000_000


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "model.onnx").write_bytes(b"x" * 100)
    (tmp_path / "report.html").write_bytes(b"x" * 5000)
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "one").write_bytes(b"x" * 10)
    checkpoint = Checkpoint.open("mini")
    found = measure.file_sizes(tmp_path, checkpoint)
    assert found.engine_files == {
        "model.onnx": 100, "plans/one": 10, "report.html": 5000, "weights.safetensors": 1000
    }  # fmt: skip
    assert found.engine_transformer == 1110  # the report is not needed to run it

    stored = checkpoint.root / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(str(stored), "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert found.parameters == parameters
    assert (found.original_fp32, found.original_bf16) == (4 * parameters, 2 * parameters)
    assert found.original_files == stored.stat().st_size
    assert found.ratio_to_fp32 == pytest.approx(1110 / (4 * parameters))


def test_a_missing_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(DitqError, match="no such engine folder"):
        measure.file_sizes(tmp_path / "engine", Checkpoint.open("mini"))


def test_peak_memory_sees_what_the_call_touches_and_not_its_parent() -> None:
    parent = bytearray(b"x") * (700 * MB)
    held = measure.peak_memory("operator:mul", "x", 300 * MB)
    assert measure.resident_peak() > len(parent)
    # One string of 300 MB; importing `operator` and reading the arguments take far less than the 20 MB of slack.
    assert held.peak - held.before == pytest.approx(300 * MB, abs=20 * MB)
    assert held.before < 600 * MB


def test_a_failing_call_is_told_in_one_line() -> None:
    with pytest.raises(DitqError, match="measuring the memory of operator:truediv: ZeroDivisionError") as caught:
        measure.peak_memory("operator:truediv", 1, 0)
    assert "\n" not in str(caught.value)


class Clock:
    """A clock that only the timed functions move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def task(self, name: str, seconds: list[float]) -> Callable[[], None]:
        steps = iter(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += next(steps)

        return run


def test_callables_are_timed_in_turns_after_warming_up() -> None:
    clock = Clock()
    speed = measure.measure_speed(
        {"a": clock.task("a", [9.0, 4.0, 6.0, 8.0]), "b": clock.task("b", [9.0, 2.0, 2.0, 1.0])},
        rounds=3,
        warmup=1,
        clock=clock,
    )
    assert "".join(clock.order) == "ab" + "ab" + "ba" + "ab"
    assert speed.timings["a"].seconds == [4.0, 6.0, 8.0] and speed.timings["b"].seconds == [2.0, 2.0, 1.0]
    assert (speed.timings["a"].median, speed.timings["a"].fastest, speed.timings["a"].slowest) == (6.0, 4.0, 8.0)
    assert speed.ratio("b", "a") == 3.0  # the median of 2, 3 and 8
    assert speed.ratio("a", "a") == 1.0
    rows = measure.table(speed, "a")
    assert rows[1]["times_as_fast"] == 3.0 and rows[1]["median_ms"] == 2000.0


def test_the_real_clock_measures_seconds() -> None:
    speed = measure.measure_speed({"sleep": lambda: time.sleep(0.02)}, rounds=2, warmup=0)
    assert speed.timings["sleep"].fastest >= 0.02
