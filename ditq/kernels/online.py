"""What a kernel does to the input of a linear, read off its transform and format; and how a token is cut for it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any

import torch
import triton
from torch import Tensor

from ditq.nn.input_transform import InputTransform
from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.raw_bytes import raw_bytes
from ditq.numerics.rotation import BlockStep, PermuteStep, Rotation

_WIDEST = 32768  # channels of a padded token
_WIDEST_FULL = 8192  # the same where it is multiplied from both sides, and so held in registers whole


@dataclass(frozen=True, eq=False)
class Online:
    """What a kernel does to the input of a linear: transform and format.

    a, b: the token as a matrix. first [b, b], second [a, a]: matrices, of signs in bfloat16 with their common `size` taken
    out, else float32. start, stop: rows of Z that the first is for. limits: the format's divisor and shift, float32 [2]; a
    tensor, so that layers which differ in nothing else share what is compiled.
    """

    width: int
    a: int
    b: int
    first: Tensor | None
    second: Tensor | None
    size: float
    start: int
    stop: int
    inverse_scale: Tensor | None
    shift: Tensor | None
    form: ActivationFormat
    calibrated: Tensor | None = None
    limits: Tensor | None = None

    def to(self, device: torch.device) -> Online:
        """The same with its tensors there."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def fingerprint(self) -> str:
        """The same for those that do the same."""
        parts = []
        for value in (getattr(self, f.name) for f in fields(self)):
            tensor = isinstance(value, Tensor)
            parts.append(sha256(raw_bytes(value.cpu()).numpy().tobytes()).hexdigest() if tensor else repr(value))
        return " ".join(parts)


def matrix_of(step: BlockStep) -> tuple[Tensor, float]:
    """(entries, common size): signs in bfloat16, or any entries in float32 with size 1."""
    size = float(step.matrix.abs().max())
    if bool(((step.matrix.abs() - size).abs() < 1e-9).all()):
        return step.matrix.sign().to(torch.bfloat16).contiguous(), size
    return step.matrix.float().contiguous(), 1.0


def online(
    transform: InputTransform | None, form: ActivationFormat, calibrated: Tensor | None, width: int
) -> Online | None:
    """The transform and format as the kernel takes them; None where it has no form of them."""
    group = form.group_size if form.granularity == "group" else 0
    scale, shift = (None, None) if transform is None else (transform.inverse_scale, transform.shift)
    rotations = [] if transform is None else transform.rotations
    made = None
    if not rotations:
        b = group or next(b for b in range(min(width, 128), 0, -1) if width % b == 0)
        made = Online(width, width // b, b, None, None, 1.0, 0, 0, scale, shift, form, calibrated)
    elif len(rotations) == 1 and not group:
        start, stop, rotation = rotations[0]
        steps, block = rotation.steps, rotation.steps[0]
        if isinstance(block, BlockStep):
            first, size = matrix_of(block)
            b = len(first)
            if len(steps) == 1 and not (start % b or stop % b or width % b):
                made = Online(
                    width, width // b, b, first, None, size, start // b, stop // b, scale, shift, form, calibrated
                )
            elif (start, stop) == (0, width) and _is_full(rotation):
                assert isinstance(steps[2], BlockStep)
                second, other = matrix_of(steps[2])
                if second.dtype == first.dtype:
                    a = len(second)
                    made = Online(width, a, b, first, second, size * other, 0, a, scale, shift, form, calibrated)
    if made is None:
        return None
    if form.granularity != "none":
        made = replace(made, limits=torch.tensor([form.divisor, form.shift], dtype=torch.float32))
    widest = _WIDEST if made.second is None else _WIDEST_FULL
    return made if triton.next_power_of_2(made.a) * triton.next_power_of_2(made.b) <= widest else None


def _is_full(rotation: Rotation) -> bool:
    """Whether it is block step, stride, block step, with a b channels."""
    steps = rotation.steps
    if len(steps) != 3 or not isinstance(steps[1], PermuteStep) or not isinstance(steps[2], BlockStep):
        return False
    assert isinstance(steps[0], BlockStep)
    shape = (len(steps[2].matrix), len(steps[0].matrix))
    return steps[1].stride == shape and shape[0] * shape[1] == rotation.size


@dataclass(frozen=True)
class Cut:
    """How a token is cut: rows of Z a chunk, warps that share one."""

    rows: int
    warps: int


_CHUNKS = 4  # of a token, which all stay in registers
# Of a thread that holds so many chunks, somewhat fewer than it would take, so that one token more fits.
_REGISTERS = {3: 128, 4: 168}


def cut_of(plan: Online) -> Cut:
    """What was fastest on an H100: 4096 channels a chunk and 32 a thread; a full rotation needs its token whole."""
    b = max(triton.next_power_of_2(plan.b), 16)
    rows = max(triton.next_power_of_2(plan.a), 16)
    if plan.second is not None:
        return Cut(rows, max(1, min(4, rows * b // 1024)))  # more warps would spill
    rows = min(rows, max(4096 // b, triton.next_power_of_2(triton.cdiv(plan.a, _CHUNKS)), 16))
    return Cut(rows, max(1, min(8, rows * b // 1024)))


def registers_of(chunks: int, capability: int) -> int | None:
    """What a thread may take at most, for tokens in bfloat16 or FP8 of so many chunks; None for what it wants.

    For H100 and H200 alone (capability 90): products of other GPUs take more registers, which would spill.
    """
    return _REGISTERS.get(chunks) if capability == 90 else None
