"""Carriers: the numbers that a matrix product multiplies. Levels of codebooks are snapped to them, and so are inputs.

    int8          whole numbers -128 .. 127, for integer products
    float8_e4m3   a sign, four bits of exponent, three of mantissa, no infinity; |v| <= 448 (Micikevicius et al., FP8 Formats
                  for Deep Learning, arXiv 2209.05433), for GPUs whose tensor cores multiply FP8

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
    """

    name: str
    dtype: torch.dtype
    place: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    largest: Callable[[int], int]
    stretch: Callable[[int, int], int]
    grid: Callable[[], Tensor]

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
    return bits.to(values.dtype) * values.sign()


def _value_e4m3(places: Tensor) -> Tensor:
    return places.abs().to(torch.uint8).view(E4M3).to(places.dtype) * places.sign()


def _grid_e4m3() -> Tensor:
    """The 253 numbers; the ends are there more than once, since three codes are left."""
    return _value_e4m3(torch.arange(-128, 128).clamp(-126, 126).float()).to(E4M3)


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
CARRIERS = {carrier.name: carrier for carrier in (INT8, FLOAT8)}


def carrier_of(table: Tensor) -> Carrier:
    """The carrier that a tensor of its numbers belongs to, by dtype."""
    return next(carrier for carrier in CARRIERS.values() if carrier.dtype == table.dtype)
