"""local_attention: image tokens attend to a window of picture or video and to the text, so that cost grows with its size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from ditq.errors import DitqError
from ditq.nn.structural.local_attention import LocalAttention, told
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.knapsack import solve
from ditq.numerics.window import SHAPES, Shape, Window
from ditq.passes.attention_conversion import FittedConversion, Place
from ditq.passes.attention_records import AttentionRecord, head_part_errors, part_error
from ditq.passes.base import register, setting
from ditq.passes.gate import limit_setting

RADII = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SPANS = (1, 3, 5, 7, 9, 13, 17, 25)
OWN = (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25)  # of heads by themselves, which have the more to choose among
FRAMES = (0, 1, 3, 5, 7)
HEADS = ("alike", "own")


@register
@dataclass(frozen=True)
class LocalAttentionPass(FittedConversion):
    """Let each image token attend to a window of the picture, to all text and, if wanted, to the picture in small.

    `circle` sees the keys with dy^2 + dx^2 < window^2 (CLEAR, Liu 2024, arXiv 2412.16112); `tiles` the window x window tiles
    around its own (Sliding Tile Attention, Zhang 2025, arXiv 2502.04507), which costs less for as many keys; of a video in
    `frames` tiles of frames. Text attends to all. Weights of the linears stay as they are.

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
    frames: int = setting(
        3,
        "of a video: tiles of frames that a window reaches over; 0: all frames; `search`: as of `window`",
        words=("search",),
    )
    tile_frames: int = setting(4, "frames of a tile of a video")
    heads: str = setting(
        "alike",
        "one window for all heads of an attention, or for each its own, at the least error for as many multiply-adds",
        HEADS,
    )
    error: float = setting(
        0.01,
        "largest relative squared error of an attention's output that `search` allows",
        only=("window", ("search",)),
    )
    pool: int = setting(0, "every pool x pool tokens are one key and value more, for all; 0: none")
    temperature: bool = setting(True, "sharpen scores at larger pictures than those calibrated on, by sqrt(log N)")

    limit: float | str = limit_setting()

    def check(self) -> None:
        super().check()
        least = min(self.tile, self.tile_frames, 1 if self.window == "search" else self.window)
        if least < 1 or self.error <= 0:
            raise DitqError("pass 'local_attention': tile, tile_frames, window and error must be above 0")
        if min(self.pool, 0 if self.frames == "search" else self.frames) < 0:
            raise DitqError("pass 'local_attention': pool and frames must not be negative")

    def part(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> TokenAttention | None:
        searched = self.window == "search" or (self.frames == "search" and bool(place.layout.frames))
        if searched and not records:
            return None
        made = self.offers(place, records, usual)
        if not searched:
            return made[0] if made else None
        return next((part for part in made if part_error(part, records) <= self.error), None)

    def offers(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> list[TokenAttention]:
        """All windows that `search` knows and that leave something out, from the smallest on; without it the one that is set.
        Where heads have their own, those that need no more than it."""
        known = RADII if self.shape == "circle" else SPANS
        sizes = [self.window] if self.window != "search" else known
        made = [self._made(place, window, usual) for window in self._windows(place, sizes)]
        if self.heads == "alike" or not records:
            return [*made]
        limits = [part.macs(place.grid) for part in made]
        own = [self._made(place, windows, usual) for windows in self._of_heads(place, records, limits)]
        return [*{part.windows: part for part in own}.values()]

    def _made(self, place: Place, window: Window | Sequence[Window | None] | None, usual: int) -> LocalAttention:
        known = usual if self.temperature else 0
        return LocalAttention(**place.arguments, usual=known, window=window, pool=self.pool)

    def _of_heads(
        self, place: Place, records: Sequence[AttentionRecord], limits: Sequence[int]
    ) -> Iterator[list[Window | None]]:
        """A window for each head, or none, at the least error within each limit of multiply-adds."""
        windows = [*self._windows(place, RADII if self.shape == "circle" else OWN), None]
        parts = [self._made(place, window, 0) for window in windows]
        errors = np.stack([head_part_errors(part, records) for part in parts], 1)
        macs = [part.macs_a_head(window, place.grid) for part, window in zip(parts, windows, strict=True)]
        sizes = np.tile(np.array(macs, dtype=np.int64), (len(errors), 1))
        return ([windows[number] for number in solve(errors, sizes, limit)] for limit in limits)

    def _windows(self, place: Place, sizes: Sequence[int]) -> list[Window]:
        """Those of these sizes that differ there and leave something out."""
        shape: Shape = "circle" if self.shape == "circle" else "tiles"
        frames = [self.frames] if self.frames != "search" else FRAMES
        sides, found = place.grid.sides, dict[tuple[int, ...], Window]()
        for size, span in product(sizes, frames if place.layout.frames else [0]):
            tile_frames = self.tile_frames if place.layout.frames else 1
            made = Window(shape, size, self.tile, span, tile_frames)
            same = (size if shape == "circle" else 0, *made.extents(*sides))
            if not made.covers(*sides):
                found.setdefault(same, made)  # all frames, if as many are the same
        return sorted(found.values(), key=lambda made: made.keys_a_query(*sides))

    def described(self, part: TokenAttention) -> str:
        assert isinstance(part, LocalAttention)
        pooled = f", pooled by {self.pool}" if self.pool else ""
        return f"{told(part.windows)}{pooled}"
