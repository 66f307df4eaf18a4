"""Carriers: the numbers that a matrix product multiplies. Levels of codebooks are snapped to them, and so are inputs.

    int8          whole numbers -128 .. 127, for integer products
    float8_e4m3   a sign, four bits of exponent, three of mantissa, no infinity; |v| <= 448 (Micikevicius et al., FP8 Formats
                  for Deep Learning, arXiv 2209.05433), for GPUs whose tensor cores multiply FP8
    float4_e2m1   a sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP Microscaling Formats v1.0,
                  5.3.3), in blocks of 16 that have an FP8 scale each: NVFP4, for GPUs whose tensor cores multiply that

A carrier counts its numbers: place 0 is 0, place k the k-th above it, -k the k-th below. What moves levels apart or clamps
them works on places, and so need not know how far they are from each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST_E4M3 = 448.0
SMALLEST_E4M3 = 2.0**-9  # above 0
LARGEST_E2M1 = 6.0
BLOCK = 16  # columns or channels that share a scale in NVFP4


@dataclass(frozen=True)
class Carrier:
    """A grid of at most 2^8 numbers.

    Attributes:
        dtype: that stores one in a byte.
        place: values (any shape) -> the place of the nearest number, half to even, in the same floating dtype.
        value: places -> the numbers there.
        largest: bits of a code -> where the largest level of its codebook stands.
        stretch: (largest level, bits) -> the factor that brings levels in equal proportion near there, exact where they are.
        grid: () -> all its numbers, ascending, [2^8] in the dtype: the levels of 8-bit codes.
        multiplier: dtype of what multiplies the numbers of a group of columns: uint8 counts 255ths, and the result is a number
            of the grid again; FP8 numbers are scales of blocks, which the product takes in beside the numbers.
    """

    name: str
    dtype: torch.dtype
    place: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    largest: Callable[[int], int]
    stretch: Callable[[int, int], float]
    grid: Callable[[], Tensor]
    multiplier: torch.dtype = torch.uint8

    def nearest(self, values: Tensor) -> Tensor:
        """The number of the grid next to each value, in the same floating dtype."""
        return self.value(self.place(values))

    def stored(self, values: Tensor) -> Tensor:
        """Numbers of the grid in its dtype."""
        return values.to(self.dtype)

    def distinct(self, levels: Tensor, largest: float, smallest: float | None = None) -> Tensor:
        """Levels [..., n], ascending -> numbers from `smallest` (else the first above 0) to `largest`, all different.

        Plain rounding, except where two levels would fall together: those move up to the next free number, so that no code is
        wasted.
        """
        order = torch.arange(levels.shape[-1], dtype=levels.dtype, device=levels.device)
        first, last = (
            0.0 if end is None else float(self.place(torch.tensor(float(end)))) for end in (smallest, largest)
        )
        first = 1.0 if smallest is None else first
        spread = (self.place(levels).clamp_min(first) - order).cummax(dim=-1).values + order
        return self.value(torch.minimum(spread, last - order.flip(0)))


def _largest_int8(bits: int) -> int:
    """127, or 64 for codes of at most 4 bits.

    Within 64, two products with uint8 activations fit 16 bits (2 * 255 * 64 < 2^15), which x86 CPUs without VNNI add them
    in: their fast kernel is exact then. With 16 levels or fewer the coarser grid adds 2 % to the squared error at most.
    """
    return 64 if bits <= 4 else 127


def _place_e4m3(values: Tensor) -> Tensor:
    """The bits of an FP8 number without its sign count the numbers from 0 up."""
    bits = values.abs().clamp_max(LARGEST_E4M3).float().to(E4M3).view(torch.uint8)
    return bits.to(values.dtype).copysign_(values)  # 127 where it is not a number, which stands for that


def _value_e4m3(places: Tensor) -> Tensor:
    return places.abs().to(torch.uint8).view(E4M3).to(places.dtype).copysign_(places)


def _grid_e4m3() -> Tensor:
    """The 253 numbers; the ends are there more than once, since three codes are left."""
    return _value_e4m3(torch.arange(-128, 128).clamp(-126, 126).float()).to(E4M3)


def _place_e2m1(values: Tensor) -> Tensor:
    """Numbers lie 1/2 apart up to 2, 1 up to 4 and 2 from there: the place of m is the least of 2 m, m + 2 and m / 2 + 4."""
    magnitude = values.abs().clamp_max_(LARGEST_E2M1)
    place = torch.minimum((2 * magnitude).round_(), magnitude.round().add_(2))
    return torch.minimum(place, (magnitude / 2).round_().add_(4)).copysign_(values)


def _value_e2m1(places: Tensor) -> Tensor:
    place = places.abs()
    number = torch.maximum(place / 2, place - 2)
    return torch.maximum(number, 2 * place - 8).copysign_(places)


def _grid_e2m1() -> Tensor:
    """The 15 numbers; the ends are there more often, since codes of 8 bits are many more."""
    return _value_e2m1(torch.arange(-128, 128).clamp(-7, 7).float()).to(torch.float8_e5m2)


INT8 = Carrier(
    "int8",
    torch.int8,
    torch.round,
    lambda places: places,
    _largest_int8,
    lambda top, bits: _largest_int8(bits) // top,
    lambda: torch.arange(-128, 128).to(torch.int8),
)
FLOAT8 = Carrier(
    "float8_e4m3",
    E4M3,
    _place_e4m3,
    _value_e4m3,
    lambda bits: int(LARGEST_E4M3),
    lambda top, bits: 1 << max(0, (int(LARGEST_E4M3) // top).bit_length() - 1),
    _grid_e4m3,
)
FLOAT4 = Carrier(
    "float4_e2m1",
    torch.float8_e5m2,  # holds every FP4 number; torch's own FP4 type has two a byte and no arithmetic
    _place_e2m1,
    _value_e2m1,
    lambda bits: int(LARGEST_E2M1),
    lambda top, bits: LARGEST_E2M1 / top,
    _grid_e2m1,
    E4M3,
)
CARRIERS = {carrier.name: carrier for carrier in (INT8, FLOAT8, FLOAT4)}


def carrier_of(table: Tensor) -> Carrier:
    """The carrier that a tensor of its numbers belongs to, by dtype."""
    return next(carrier for carrier in CARRIERS.values() if carrier.dtype == table.dtype)
