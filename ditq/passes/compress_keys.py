"""compress_keys: keys and values of the picture become one for every square of tokens, which all queries attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ditq.errors import DitqError
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.token_attention import TokenAttention
from ditq.passes.attention_conversion import FittedConversion, Place
from ditq.passes.attention_records import AttentionRecord
from ditq.passes.base import register, setting
from ditq.passes.gate import limit_setting


@register
@dataclass(frozen=True)
class CompressKeys(FittedConversion):
    """Sum keys and values of image tokens over squares of `factor` x `factor`, with learned weights that start as a mean.

    As PixArt-Sigma does in its deeper half (Chen 2024, arXiv 2403.04692). Text keys stay as they are, and so do all queries:
    attention takes factor^2 less, however large the picture is. Weights of the linears stay too; `distill` makes up for what
    is lost.

    Example:
        - compress_keys: {factor: 2, fraction: 0.5}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "compress_keys"
    factor: int = setting(2, "tokens along a side of a square that becomes one key and value")
    count: bool = setting(
        True, "a square's key weighs as many as it stands for: log of their number is added to its scores"
    )
    temperature: bool = setting(True, "sharpen scores at larger pictures than those calibrated on, by sqrt(log N)")
    limit: float | str = limit_setting()

    def check(self) -> None:
        super().check()
        if self.factor < 2:
            raise DitqError("pass 'compress_keys': factor must be at least 2")

    def part(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> TokenAttention | None:
        if place.grid.image == 1:
            return None
        return CompressedKeys(
            **place.arguments, usual=usual if self.temperature else 0, factor=self.factor, count=self.count
        )

    def described(self, part: TokenAttention) -> str:
        return f"keys of {self.factor} x {self.factor}"
