"""Sizes on disk, peak memory and speed: measured, with the conditions of the measurement beside each number."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditq.errors import DitqError

if TYPE_CHECKING:  # the process whose memory is measured imports this file and should import little else
    from ditq.checkpoint import Checkpoint

BYTES_FP32, BYTES_BF16 = 4, 2


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk. The engine's transformer is everything that it needs to run: weights and graph, not the report."""

    engine_files: dict[str, int]
    engine_transformer: int
    original_files: int
    original_fp32: int
    original_bf16: int
    parameters: int

    @property
    def ratio_to_fp32(self) -> float:
        return self.engine_transformer / self.original_fp32

    @property
    def ratio_to_bf16(self) -> float:
        return self.engine_transformer / self.original_bf16


def file_sizes(engine: str | Path, checkpoint: Checkpoint) -> Sizes:
    """Sizes of an engine folder against the checkpoint's transformer, as stored and as plain fp32 and bf16 values.

    Raises DitqError where there is no engine folder.
    """
    folder = Path(engine)
    if not folder.is_dir():
        raise DitqError(
            f"{folder}: no such engine folder; compile one with 'ditq compile {checkpoint.name} -o {folder}'"
        )
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
    report = {name for name in files if name.startswith("report.")}
    parameters = checkpoint.parameters
    return Sizes(
        engine_files=files,
        engine_transformer=sum(size for name, size in files.items() if name not in report),
        original_files=sum(file.path.stat().st_size for file in checkpoint.files),
        original_fp32=parameters * BYTES_FP32,
        original_bf16=parameters * BYTES_BF16,
        parameters=parameters,
    )


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a fresh process: after its imports, and the highest value by the end of the call."""

    before: int
    peak: int


def resident_peak() -> int:
    """Highest resident size of this process so far, in bytes.

    Linux counts the parent's pages into a child's ru_maxrss at exec, so the kernel's own mark of this address space
    (VmHWM) is read there; elsewhere it is ru_maxrss (bytes on macOS, KiB on other systems).
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_CHILD = """
import importlib, json, sys
module, name, arguments, keywords = json.load(sys.stdin)
function = importlib.import_module(module)
for part in name.split("."):
    function = getattr(function, part)
from ditq.report.measure import resident_peak
before = resident_peak()
function(*arguments, **keywords)
print("\\n" + json.dumps({"before": before, "peak": resident_peak()}))
"""


def peak_memory(function: str, *arguments: Any, threads: int | None = None, **keywords: Any) -> Memory:
    """Peak resident memory of function(*arguments, **keywords) in a fresh Python process.

    `function` is "package.module:name"; the arguments must be JSON. Raises DitqError with the last line of what the
    process printed where it fails.
    """
    module, colon, name = function.partition(":")
    if not colon:
        raise ValueError(f"{function!r} is not of the form 'package.module:name'")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps([module, name, list(arguments), keywords]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise DitqError(f"measuring the memory of {function}: {lines[-1]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable: every round, and how they are told."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        return max(self.seconds)


@dataclass(frozen=True)
class Speed:
    """Timings by name, measured in turns on one input. `machine` is a label only."""

    timings: dict[str, Timing]
    machine: str = ""

    def ratio(self, name: str, reference: str) -> float:
        """How many times as fast as `reference` it is: the median over the rounds of reference / name.

        Both numbers of one round were taken next to each other, so a machine that slows down does so for both.
        """
        pairs = zip(self.timings[reference].seconds, self.timings[name].seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)


def measure_speed(
    callables: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    machine: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time the callables in turns, A B C A B C ..., after `warmup` untimed rounds.

    In turns, and each round in the opposite order of the one before, so that neither a drift of the machine nor what
    the one leaves in the caches counts for or against one of them.
    """
    if rounds < 1:
        raise ValueError("at least one round is needed")
    for _ in range(warmup):
        for function in callables.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    for _ in range(rounds):
        for name in order:
            start = clock()
            callables[name]()
            seconds[name].append(clock() - start)
        order.reverse()
    return Speed({name: Timing(values) for name, values in seconds.items()}, machine)


def table(speed: Speed, reference: str) -> Sequence[dict[str, Any]]:
    """Rows for the report and the terminal: median, fastest, slowest in ms, and times as fast as `reference`."""
    return [
        {
            "name": name,
            "median_ms": timing.median * 1000,
            "fastest_ms": timing.fastest * 1000,
            "slowest_ms": timing.slowest * 1000,
            "times_as_fast": speed.ratio(name, reference),
        }
        for name, timing in speed.timings.items()
    ]
