"""Every kernel compiles for each generation of GPUs, within its registers and shared memory, onto its low-bit tensor cores."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from tools import gpu_resources  # noqa: E402  triton first
from tools.gpu_resources import GENERATIONS, REGISTERS, SHARED, TABLE, Resources  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


def written() -> dict[tuple[str, int], Resources]:
    """docs/gpu-resources.md by kernel and compute capability."""
    found = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.match(r"\d+\.\d ", cells[0]):
            capability = int(cells[0].split()[0].replace(".", ""))
            registers, stack, spilled = map(int, cells[2:5])
            found[cells[1], capability] = Resources(registers, stack, spilled, int(float(cells[5]) * 1024))
    return found


def test_the_table_is_of_the_kernels_as_they_are_and_covers_every_generation() -> None:
    assert f"`{gpu_resources.sources()}`" in TABLE.read_text(), "python -m tools.gpu_resources --write"
    expected = {
        (case.name, capability)
        for capability in GENERATIONS
        for case in gpu_resources.cases(capability)
        if case.capability <= capability
    }
    assert set(written()) == expected


# Bytes, of kernels for which that was measured on an H100 to be faster than fewer threads at once that need none.
SPILLED = {
    "norm, rotary embedding, rotation of heads, and values, to FP8, 128 channels": 32,
    "GELU, block Hadamard, int8, 12288 channels": 96,
    "FP8 attention, GELU behind it, block Hadamard, FP8, 15360 channels": 32,
}


def test_no_kernel_spills_and_each_fits_the_shared_memory() -> None:
    for (name, capability), found in written().items():
        assert found.spilled <= SPILLED.get(name, 0) * (capability == 90), f"{name} on {capability}"
        assert found.registers <= REGISTERS, f"{name} on {capability}"
        assert found.shared <= SHARED[capability], f"{name} on {capability}"


# Kernel (the beginning of its name), compute capability, the instruction that does the multiplying.
SAMPLE = [
    ("w4a8, ", 80, r"mma\.sync\.aligned\.m16n8k32\.\S*s32\.s8\.s8\.s32"),
    ("w8a8 FP8, ", 89, r"mma\.sync\.aligned\.m16n8k32\.\S*f32\.e4m3\.e4m3\.f32"),
    ("w4a8, ", 90, r"wgmma\.mma_async\S*\.s32\.s8\.s8"),
    ("w3a8, ", 100, r"tcgen05\.mma\S*kind::i8"),
    ("12 experts, w4a8, ", 90, r"wgmma\.mma_async\S*\.s32\.s8\.s8"),
    ("norm, modulation, block Hadamard, int8", 90, r"mma\S*\.bf16\.bf16"),
]


@pytest.mark.parametrize(("start", "capability", "instruction"), SAMPLE)
def test_kernels_compile_to_what_the_table_says_and_multiply_on_tensor_cores(
    start: str, capability: int, instruction: str
) -> None:
    case = next(case for case in gpu_resources.cases(capability) if case.name.startswith(start))
    compiled: Any
    compiled, found = gpu_resources.compile_case(case, capability)
    assert re.search(instruction, compiled.asm["ptx"])
    if f"Triton {triton.__version__} " in TABLE.read_text():
        entry = written()[case.name, capability]
        assert (found.registers, found.stack, found.spilled) == (entry.registers, entry.stack, entry.spilled)
        assert abs(found.shared - entry.shared) <= 52  # printed in tenths of KiB
    assert found.stack == found.spilled == 0


def test_the_gpu_benchmark_needs_torch_and_triton_alone() -> None:
    blocked = (
        "diffusers",
        "transformers",
        "accelerate",
        "safetensors",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "click",
        "rich",
        "yaml",
    )
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from tools.bench_gpu import main\n"
        "main(['--device', 'cpu', '--small', '--rounds', '1', '--no-products', '--shapes', 'dit-xl-block', '--only', 'eager'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "bf16 eager" in done.stdout, done.stderr[-2000:]
