"""The kernels' own tests, in processes of their own: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = (
    ("matmul", "quantize", "bench", "heads"),
    ("fast_linear", "experts", "denoiser", "side_by_side", "vector"),
)  # each a process


@pytest.mark.parametrize("names", FILES, ids=" ".join)
def test_kernels_compute_their_meaning(names: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    files = [str(HERE / f"interpreted_{name}.py") for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging", "--tb=short"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_every_file_of_theirs_is_run() -> None:
    assert {f"interpreted_{name}" for names in FILES for name in names} == {
        path.stem for path in HERE.glob("interpreted_*.py")
    }
