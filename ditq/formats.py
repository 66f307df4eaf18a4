"""Bit formats by short name: `w4a8` is 4-bit weights with 8-bit activations, `a16` leaves activations in floating point.

`nvfp4` is 4 bits on both sides too, but as numbers in floating point: FP4 in blocks of 16 with an FP8 scale each, as GPUs from
Blackwell on multiply them. It says all of a format; codebook and scales are its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ditq.errors import DitqError

NVFP4 = "nvfp4"
_NAME = re.compile(r"w([2-8])a(4|5|6|7|8|16)")


@dataclass(frozen=True)
class BitFormat:
    """Bits of weights (2-8) and activations (4-8, or 16 for not quantized)."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, name: str) -> BitFormat:
        """`w4a8` -> BitFormat(4, 8); `nvfp4` -> BitFormat(4, 4).

        Raises:
            DitqError: not such a name.
        """
        if name == NVFP4:
            return cls(4, 4)
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise DitqError(f"unknown format {name!r}; write w<2-8>a<4-8 or 16>, e.g. w4a8, w3a6, w4a16; or nvfp4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"
