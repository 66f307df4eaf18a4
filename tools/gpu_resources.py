"""Compile every kernel of ditq for each generation of GPUs, without one, and print registers, spills and shared memory.

python -m tools.gpu_resources                  # the table
python -m tools.gpu_resources --write          # into docs/gpu-resources.md, which a test watches
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ditq.kernels import decode, heads, matmul, quantize, tma_matmul, vector
from ditq.kernels.matmul import Tile
from ditq.kernels.online import Online, online
from ditq.kernels.quantize import Before
from ditq.kernels.storage import StoredWeight, stack, store, store_carrier
from ditq.kernels.tuning import brought_tiles, tiles
from ditq.nn import ActivationFormat, InputTransform
from ditq.numerics.carrier import E4M3
from ditq.numerics.rotation import block_hadamard_rotation, hadamard_rotation
from ditq.numerics.weight_code import WeightCode

TABLE = Path(__file__).parent.parent / "docs" / "gpu-resources.md"
GENERATIONS = {
    80: "Ampere (A100)",
    89: "Ada (RTX 40, L40)",
    90: "Hopper (H100)",
    100: "Blackwell (B200)",
    120: "Blackwell (RTX 50)",
}
# Bytes that a block may have (CUDA programming guide, compute capabilities).
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 255
_POINTERS = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16",
    E4M3: "*fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A kernel with what it is called with. `capability`: the first generation that has it."""

    name: str
    kernel: Any
    values: list[Any]
    constants: dict[str, Any]
    capability: int = 80


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel: registers a thread, bytes of stack and of spills, bytes of shared memory a block."""

    registers: int
    stack: int
    spilled: int
    shared: int


EXPERTS, SLOTS, WIDTH = 12, 960, 768  # of FLUX with the defaults of `moe`: slots for 4608 tokens, width of an expert


def _weight(
    bits: int, float8: bool = False, grouped: bool = True, floats: bool = False, rows: int = 3072
) -> StoredWeight:
    """rows x 3072 without values: only shapes and dtypes are looked at."""
    columns = 3072
    if bits == 8:
        return store_carrier(torch.zeros(rows, columns, dtype=E4M3 if float8 else torch.int8), torch.ones(rows))
    table = torch.zeros(2**bits, dtype=torch.int8)
    table = table.view(E4M3) if float8 else table
    groups = columns // 64
    multiplier = torch.zeros(rows, groups, dtype=torch.uint8) if grouped and not floats else None
    scale = torch.ones(rows, groups) if floats else torch.ones(rows)
    return store(WeightCode(torch.zeros(rows, columns, dtype=torch.uint8), table, scale, multiplier, bits))


def _product(
    name: str,
    stored: StoredWeight,
    kind: torch.dtype,
    tile: Tile,
    capability: int = 80,
    experts: int = 1,
    activation: str = "",
) -> Case:
    tokens = 4608
    x = torch.empty(tokens, stored.columns, dtype=kind)
    scale = None if kind == torch.bfloat16 else torch.empty(tokens)
    chosen = torch.empty(experts, SLOTS, dtype=torch.int32) if experts > 1 else None
    bias = torch.empty(stored.rows)
    product = matmul.Product(x, scale, stored, bias, chosen=chosen, experts=experts, activation=activation)
    count, tokens, outputs = product.size
    y = torch.empty(count * tokens, outputs, dtype=torch.bfloat16)
    label = f"{name}, {tile.tokens} x {tile.outputs}{', weight first' if tile.weight_first else ''}"
    label += f", {activation}" if activation else ""
    if tile.brought:
        values, constants = tma_matmul.arguments(product, y, tile)
        return Case(f"{label}, by TMA", tma_matmul.tma_matmul_kernel, values, constants, capability)
    values, constants = matmul.arguments(product, y, tile)
    return Case(label, matmul.matmul_kernel, values, constants, capability)


def _quantizer(
    capability: int, name: str, width: int, before: Before, form: ActivationFormat, full: bool = False, behind: int = 0
) -> Case:
    """behind: so many of the channels are of a tensor of their own, put behind the others."""
    rotation = hadamard_rotation(width) if full else block_hadamard_rotation(width, 64)
    plan = online(InputTransform(rotations=[(0, width, rotation)]), form, None, width)
    assert isinstance(plan, Online)
    x = torch.empty(64, width - behind, dtype=torch.bfloat16 if before.times is None else E4M3)
    tail = torch.empty(64, behind, dtype=torch.bfloat16) if behind else None
    q = torch.empty(64, width, dtype=quantize.number_type(form))
    values, constants = quantize.arguments(
        x, 64, before, plan, q, torch.empty(64), None, tail=tail, capability=capability
    )
    return Case(
        f"{name}, {width} channels",
        quantize.quantize_kernel,
        values,
        constants,
        89 if form.grid == "float8_e4m3" else 80,
    )


def _heads(capability: int, name: str, float8: bool, width: int) -> Case:
    """Queries and keys of 4096 tokens behind 512, and in FP8 the values."""
    x = torch.empty(1, 4096, 24, width, dtype=torch.bfloat16)
    table, weight = torch.empty(4608, width), torch.empty(width, dtype=torch.bfloat16)
    steps = heads.NORM | heads.WEIGHT | heads.ROTARY | (heads.ROTATED if float8 else 0)
    parts = [heads.Part([x], steps, [weight], 1e-6)] * 2 + [heads.Part([x], 0)] * float8
    y = [torch.empty(1, 4608, 24, width, dtype=E4M3 if float8 else torch.bfloat16)] * len(parts)
    given, constants, _ = heads.arguments(
        parts, 0, table, table, torch.empty(3) if float8 else None, y, 512, capability
    )
    return Case(f"{name}, {width} channels", heads.heads_kernel, given, constants, 89 if float8 else 80)


def cases(capability: int) -> Iterator[Case]:
    """Every kernel that such a GPU would be given, in every tile that it would be tried with."""
    forms: list[tuple[str, dict[str, Any], torch.dtype, int]] = [
        ("w4a8", {"bits": 4}, torch.int8, 80),
        ("w3a8", {"bits": 3}, torch.int8, 80),
        ("w8a8", {"bits": 8}, torch.int8, 80),
        ("w8a8 FP8", {"bits": 8, "float8": True}, E4M3, 89),
        ("w4a8 FP8", {"bits": 4, "float8": True, "grouped": False}, E4M3, 89),
        ("w4a16", {"bits": 4, "floats": True}, torch.bfloat16, 80),
    ]
    weights = [(name, _weight(**form), kind, first) for name, form, kind, first in forms]
    for name, stored, kind, first in weights:
        for tile in tiles(capability, stored.bits, kind):
            yield _product(name, stored, kind, tile, first)
        if stored.bits == 8:
            for tile in brought_tiles(capability):
                yield _product(name, stored, kind, tile, 90)
                yield _product(name, stored, kind, tile, 90, activation="gelu_tanh")
    yield _product(
        weights[0][0], weights[0][1], torch.int8, tiles(capability, 4, torch.int8)[0], activation="gelu_tanh"
    )
    for name, form, kind, first in forms:
        joined = stack([_weight(**form, rows=WIDTH)] * EXPERTS)
        for tile in tiles(capability, joined.bits, kind, EXPERTS):
            yield _product(f"{EXPERTS} experts, {name}", joined, kind, tile, first, EXPERTS)
    for name, stored, kind, _ in (weights[0], weights[1], weights[5]):
        dtype = torch.bfloat16 if kind == torch.bfloat16 else torch.int8
        values, constants = decode.arguments(stored, torch.empty(stored.rows, stored.columns, dtype=dtype))
        yield Case(f"{name}, weight in full", decode.decode_kernel, values, constants)
    few = matmul.Product(torch.empty(1, 3072, dtype=torch.bfloat16), None, weights[5][1], torch.empty(3072))
    for tile in vector.TILES:
        values, constants = vector.arguments(few, torch.empty(1, 3072, dtype=torch.bfloat16), tile)
        yield Case(
            f"w4a16, a token, {tile.outputs} rows of {tile.step} bytes, {tile.warps} warps",
            vector.vector_kernel,
            values,
            constants,
        )
    modulated = Before(
        norm=True, gamma=torch.empty(1, 3072, dtype=torch.bfloat16), beta=torch.empty(1, 3072, dtype=torch.bfloat16)
    )
    token, eight = ActivationFormat(8, "token"), ActivationFormat(8, "token", "float8_e4m3")
    gelu, of_attention = Before(activation="gelu_tanh"), torch.empty(1)
    yield _quantizer(capability, "norm, modulation, block Hadamard, int8", 3072, modulated, token)
    yield _quantizer(capability, "norm, modulation, block Hadamard, FP8", 3072, modulated, eight)
    yield _quantizer(capability, "norm, block Hadamard, int8", 5120, Before(norm=True), token)
    four = ActivationFormat(4, "token", "midrise")
    yield _quantizer(capability, "norm, modulation, full Hadamard, 4 bits", 3072, modulated, four, full=True)
    yield _quantizer(capability, "GELU, block Hadamard, int8", 12288, gelu, token)
    yield _quantizer(capability, "GELU, full Hadamard, int8", 4608, gelu, token, full=True)
    yield _quantizer(capability, "block Hadamard, int8", 15360, Before(), token)
    yield _quantizer(capability, "FP8 attention, block Hadamard, FP8", 3072, Before(times=of_attention), eight)
    both = Before(activation="gelu_tanh", times=of_attention)
    yield _quantizer(capability, "FP8 attention, GELU behind it, block Hadamard, FP8", 15360, both, eight, behind=12288)
    for width in (64, 128):
        yield _heads(capability, "norm and rotary embedding of heads", False, width)
        yield _heads(capability, "norm, rotary embedding, rotation of heads, and values, to FP8", True, width)


def compile_case(case: Case, capability: int) -> tuple[Any, Resources]:
    """(what Triton compiled, what it takes) on a GPU of that compute capability."""
    names = case.kernel.arg_names
    options = {name: value for name, value in case.constants.items() if name not in names}
    constants = {name: value for name, value in case.constants.items() if name in names}
    values = dict(zip([name for name in names if name not in constants], case.values, strict=True))
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        value = values.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, TensorDescriptor):
            number = _POINTERS[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{number}[{', '.join(map(str, value.block_shape))}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        case.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled, _resources(compiled, capability)


def _resources(compiled: Any, capability: int) -> Resources:
    """What ptxas says of the kernel's PTX, and the shared memory that Triton gives it."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        tool: Any = get_ptxas(capability) if get_ptxas.__code__.co_argcount else get_ptxas()
        architecture = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [tool.path, "-v", architecture, str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack, stores, loads = (int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said))
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    return Resources(registers, stack, stores + loads, compiled.metadata.shared)


def sources() -> str:
    """Short hash of the kernels' code, so that a table of other kernels is noticed."""
    folder = Path(matmul.__file__).parent
    names = ["activation", "decode", "decoding", "heads", "matmul", "online", "quantize", "quantizing", "storage", "tma_matmul",
             "tuning", "vector"]  # fmt: skip
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names)).hexdigest()[:16]


def rows(generations: list[int]) -> Iterator[tuple[str, int, Resources]]:
    """(kernel, compute capability, what it takes)."""
    for capability in generations:
        for case in cases(capability):
            if case.capability <= capability:
                yield case.name, capability, compile_case(case, capability)[1]


@click.command()
@click.option("--write", is_flag=True, help=f"Write {TABLE.name} in docs/.")
@click.option("--only", type=int, multiple=True, help="Compute capability, such as 90; all without it.")
def main(write: bool, only: tuple[int, ...]) -> None:
    """Registers a thread, bytes of stack and spills, bytes of shared memory a block of every kernel."""
    lines = [
        "# Kernels and what they take of a GPU",
        "",
        f"Compiled by Triton {triton.__version__} with no GPU at hand. Kernels' code: `{sources()}`. Printed by:",
        "",
        "    python -m tools.gpu_resources --write",
        "",
        "Registers a thread (at most 255), bytes of stack and spills (none is wanted), KiB of shared memory a block.",
        "",
        "| compute capability | kernel | registers | stack | spills | shared memory |",
        "|---|---|---|---|---|---|",
    ]
    click.echo("\n".join(lines))
    for name, capability, found in rows(list(only) or list(GENERATIONS)):
        lines.append(
            f"| {capability // 10}.{capability % 10} {GENERATIONS[capability]} | {name} | {found.registers} | {found.stack} "
            f"| {found.spilled} | {found.shared / 1024:.1f} |"
        )
        click.echo(lines[-1])
    if write:
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
