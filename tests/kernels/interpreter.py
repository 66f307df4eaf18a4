"""What Triton's interpreter lacks: inline PTX, the few instructions that the kernels use, products of bfloat16, roundings.

The PTX text itself is run, register by register, so that a wrong selector in it is found without a GPU.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

_INSTRUCTION = re.compile(r"(\w+)\.[\w.]+ ([^;]+);")


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32 (PTX ISA, default mode): byte i is that of b:a named by nibble i; its top bit asks for the sign, spread."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


def _mad(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64) + c.view(np.int32)
    return (product & 0xFFFFFFFF).astype(np.uint32)


def _tanh(t: np.ndarray) -> np.ndarray:
    """tanh.approx.f32: as exact as PTX promises, 11 bits, and no more."""
    exact = np.tanh(t.view(np.float32))
    return ((exact.view(np.uint32) + np.uint32(0x800)) & np.uint32(0xFFFFF000)).astype(np.uint32)


_DOES = {
    "tanh": _tanh,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: a << b,
    "mov": lambda a: a,
    "prmt": _prmt,
    "mad": _mad,
}


def run_ptx(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Run straight-line PTX on 32-bit registers (uint32 arrays); $0 .. are the outputs, then the inputs."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(inputs[0], int(name, 0))

    for name, operands in _INSTRUCTION.findall(re.sub(r"\.reg [^;]+;", "", text)):
        target, *sources = [operand.strip() for operand in operands.split(",")]
        registers[target] = _DOES[name](*map(value, sources))
    return [registers[f"${i}"] for i in range(outputs)]


def install() -> None:
    """Give the interpreter `inline_asm_elementwise`, of four elements of 8 or 32 bits or a float32, and what it does wrong."""
    from triton.runtime import interpreter

    language, create_dot = interpreter.tl, interpreter.InterpreterBuilder.create_dot

    def create_wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype == language.int8:  # numpy multiplies whole numbers slowly; in float64 they are exact as well
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + rest[0].data
            return interpreter.TensorHandle(product.astype(np.int32), language.int32)
        # bfloat16 is kept as its 16 bits, which the interpreter would multiply as whole numbers.
        wide = [self.cast_impl(part, language.float32) if part.dtype == language.bfloat16 else part for part in (a, b)]
        return create_dot(self, *wide, *rest)

    convert = interpreter._convert_float
    narrow = {language.float8e4nv: torch.float8_e4m3fn, language.bfloat16: torch.bfloat16}

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source != language.float32 or target not in narrow:
            return convert(data, source, target, rounding)
        # To the nearest, half to even, as the hardware does; the interpreter cuts bits off, or loses their carry.
        rounded = torch.from_numpy(np.array(data)).to(narrow[target])
        bits = torch.uint8 if rounded.itemsize == 1 else torch.uint16
        return rounded.view(bits).numpy()

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: list[Any], types: Any, pure: bool, pack: int
    ) -> Any:
        shape = values[0].data.shape
        if pack == 1:  # one 32-bit number an instance
            (result,) = run_ptx(text, [np.ascontiguousarray(handle.data).view(np.uint32) for handle in values], 1)
            return _Results([interpreter.TensorHandle(result.view(np.float32), language.float32)])
        assert pack == 4
        inputs: list[np.ndarray] = []
        for handle in values:
            flat = np.ascontiguousarray(np.broadcast_to(handle.data, shape)).reshape(-1, pack)
            inputs += (
                [flat.view(np.uint32)[:, 0]] if flat.itemsize == 1 else list(flat.astype(np.int32).view(np.uint32).T)
            )
        assert constraints.count("=") == len(types) and constraints.split(",").count("r") == len(inputs)
        results = run_ptx(text, [np.ascontiguousarray(value) for value in inputs], len(types))
        made = [result.view(np.int8).reshape(shape) for result in results]
        return _Results([interpreter.TensorHandle(data, interpreter.tl.int8) for data in made])

    one_by_one = interpreter.ReduceOps.generic_reduce

    def reduce_by_slices(self: Any, given: Any) -> Any:
        """In the order in which the interpreter goes through single elements, a slice of the others at a time."""
        if self.axis is None or self.keep_dims:
            return one_by_one(self, given)

        def part(place: int) -> list[Any]:
            return [self.to_tensor(each.handle.data.take(place, self.axis), each.dtype) for each in given]

        found = part(0)
        for place in range(1, given[0].handle.data.shape[self.axis]):
            made = self.combine_fn.fn(*found, *part(place))
            found = list(made) if isinstance(made, tuple) else [made]
        return found

    interpreter.ReduceOps.generic_reduce = reduce_by_slices
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    interpreter.InterpreterBuilder.create_dot = create_wide_dot
    interpreter._convert_float = convert_float


class _Results:
    """What the interpreter takes for an operation of several results."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> Any:
        return self.handles[index]
