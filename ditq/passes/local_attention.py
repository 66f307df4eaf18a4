"""local_attention: image tokens attend to a window of the picture and to the text, so that cost grows with the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ditq.errors import DitqError
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.window import SHAPES, Window
from ditq.passes.attention_conversion import FittedConversion, Place
from ditq.passes.attention_records import AttentionRecord, part_error
from ditq.passes.base import register, setting
from ditq.passes.gate import limit_setting

RADII = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SPANS = (1, 3, 5, 7, 9, 13, 17, 25)


@register
@dataclass(frozen=True)
class LocalAttentionPass(FittedConversion):
    """Let each image token attend to a window of the picture, to all text and, if wanted, to the picture in small.

    `circle` sees the keys with dy^2 + dx^2 < window^2 (CLEAR, Liu 2024, arXiv 2412.16112); `tiles` the window x window tiles
    around its own (Sliding Tile Attention, Zhang 2025, arXiv 2502.04507), which costs less for as many keys. Text attends to
    all. Weights of the linears stay as they are.

    Example:
        - local_attention: {shape: tiles, tile: 8, window: search, error: 0.01}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "local_attention"
    shape: str = setting("tiles", "what a window is: square blocks of tiles, or a circle around each token", SHAPES)
    window: int = setting(
        3,
        "tiles along a side, or the circle's radius in tokens; `search`: the least within `error`, or what `macs` chooses",
        words=("search",),
    )
    tile: int = setting(8, "tokens along a side of a tile; for a circle only the block in which it is computed")
    error: float = setting(0.01, "largest relative squared error of an attention's output that `search` allows")
    pool: int = setting(0, "every pool x pool tokens are one key and value more, for all; 0: none")
    temperature: bool = setting(True, "sharpen scores at larger pictures than those calibrated on, by sqrt(log N)")

    limit: float | str = limit_setting()

    def check(self) -> None:
        super().check()
        if self.tile < 1 or self.pool < 0 or self.error <= 0 or (self.window != "search" and self.window < 1):
            raise DitqError("pass 'local_attention': tile, window and error must be above 0, pool must not be negative")

    def part(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> TokenAttention | None:
        if self.window == "search" and not records:
            return None
        made = self.offers(place, records, usual)
        if self.window != "search":
            return made[0] if made else None
        return next((part for part in made if part_error(part, records) <= self.error), None)

    def offers(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> list[TokenAttention]:
        """All windows that `search` knows and that leave something out; without it the one that is set."""
        sizes = [self.window] if self.window != "search" else RADII if self.shape == "circle" else SPANS
        known = usual if self.temperature else 0
        windows = (Window("circle" if self.shape == "circle" else "tiles", size, self.tile) for size in sizes)
        return [
            LocalAttention(**place.arguments, usual=known, window=window, pool=self.pool)
            for window in windows
            if not window.covers(place.grid.height, place.grid.width)
        ]

    def described(self, part: TokenAttention) -> str:
        assert isinstance(part, LocalAttention)
        pooled = f", pooled by {self.pool}" if self.pool else ""
        return f"{self.shape} {part.window.size}{pooled}"
