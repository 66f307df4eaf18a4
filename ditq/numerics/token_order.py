"""Orders of a picture's tokens in which those that lie near each other in the picture lie near each other in memory.

Row by row, as models have them, a square of t x t tokens lies in t pieces. In an order of windows it is one piece, and along a
Hilbert curve every square of 2^n x 2^n is. Attention does not ask where its tokens lie, so an order changes nothing but that.
Frames of a video stay one behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["windows", "hilbert"]
KINDS: tuple[Kind, ...] = ("windows", "hilbert")
LARGEST_TILE = 1 << 16


def is_size(value: object) -> bool:
    """A number of rows, columns or the like."""
    return isinstance(value, int) and value > 0


@dataclass(frozen=True)
class TokenOrder:
    """`windows`: tile by tile of `tile` x `tile` tokens, row by row of tiles and within each; at an edge tiles are smaller.

    `hilbert`: along a Hilbert curve (1891) over the smallest square of 2^n x 2^n tokens that holds a frame, without those of
    its places that lie beside the frame. `tile` says nothing there. What it leaves out has no formula, so that an exported
    graph holds the numbers themselves, for frames of the rows and columns of `picture`; the order is for such alone.
    """

    kind: Kind
    tile: int = 8
    picture: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not isinstance(self.tile, int) or not 1 <= self.tile <= LARGEST_TILE:
            raise ValueError(f"an order of tokens is {' or '.join(KINDS)}, with tiles of 1 to {LARGEST_TILE}")
        if self.picture is not None and not (len(self.picture) == 2 and all(is_size(side) for side in self.picture)):
            raise ValueError(f"the picture of an order of tokens is its rows and columns, not {self.picture}")

    def __str__(self) -> str:
        return f"windows of {self.tile} x {self.tile}" if self.kind == "windows" else "a Hilbert curve"

    def listed(self, frames: int, height: int, width: int) -> np.ndarray:
        """Which token, counted row by row, lies at each place: int64 [frames height width].

        Raises:
            ValueError: the order is for pictures of another size.
        """
        if self.picture is not None and (height, width) != self.picture:
            made, given = (" x ".join(map(str, sides)) for sides in (self.picture, (height, width)))
            raise ValueError(f"the order of tokens was made for pictures of {made} tokens, not of {given}")
        return _listed(self, frames, height, width)

    def places(self, frames: int, height: int, width: int) -> np.ndarray:
        """Where each token, counted row by row, lies: int64 [frames height width]. Raises ValueError as `listed` does."""
        self.listed(frames, height, width)
        return _places(self, frames, height, width)

    def traced(self, count: int, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """`listed` and `places` of `count` tokens, int64 [count], made of the sides of a frame, int64 [1], by operators that an
        exported graph keeps.
        """
        tile, token = self.tile, torch.arange(count, device=height.device)
        frame = _divided(token, height * width) * height * width
        token = token - frame
        if self.picture is not None:
            both = (self.listed(1, *self.picture), self.places(1, *self.picture))
            listed, places = (torch.from_numpy(numbers).to(token.device)[token] for numbers in both)
            return frame + listed, frame + places

        row, column = _divided(token, width), _rest(token, width)
        high, first = self._cut(row, height)
        wide, left = self._cut(column, width)
        places = first * width + left * high + (row - first) * wide + column - left

        first = _divided(token, tile * width) * tile
        high = torch.minimum(height - first, torch.full_like(height, tile))
        token = token - first * width
        left = _divided(token, tile * high) * tile
        wide = torch.minimum(width - left, torch.full_like(width, tile))
        token = token - left * high
        listed = (first + _divided(token, wide)) * width + left + _rest(token, wide)
        return frame + listed, frame + places

    def _cut(self, at: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tiles along a side that have these places in them: their length, and where they begin."""
        first = _divided(at, self.tile) * self.tile
        return torch.minimum(length - first, torch.full_like(length, self.tile)), first


def _divided(a: Tensor, b: Tensor | int) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")  # which is one operator of a graph; nothing here is below 0


def _rest(a: Tensor, b: Tensor) -> Tensor:
    return a - _divided(a, b) * b


@lru_cache(maxsize=64)
def _listed(order: TokenOrder, frames: int, height: int, width: int) -> np.ndarray:
    rows, columns = np.divmod(np.arange(height * width), width)
    if order.kind == "windows":
        keys = (columns % order.tile, rows % order.tile, columns // order.tile, rows // order.tile)
        frame = np.lexsort(keys)
    else:
        frame = np.argsort(along_hilbert(rows, columns, max(height, width)))
    return (np.arange(frames)[:, None] * height * width + frame).reshape(-1)


@lru_cache(maxsize=64)
def _places(order: TokenOrder, frames: int, height: int, width: int) -> np.ndarray:
    return np.argsort(order.listed(frames, height, width))


def along_hilbert(rows: np.ndarray, columns: np.ndarray, side: int) -> np.ndarray:
    """How far along a Hilbert curve over the smallest square of 2^n x 2^n that has `side` rows these places lie: int64."""
    y, x = rows.astype(np.int64), columns.astype(np.int64)
    far, half = np.zeros_like(y), 1 << max(side - 1, 0).bit_length()
    while half := half // 2:
        below, right = (y & half) > 0, (x & half) > 0
        far += half * half * ((3 * right) ^ below)
        # The quarters at both ends of the curve are turned over, the last one back to front as well.
        y, x = y & (half - 1), x & (half - 1)
        flipped = right & ~below
        y, x = np.where(flipped, half - 1 - y, y), np.where(flipped, half - 1 - x, x)
        y, x = np.where(below, y, x), np.where(below, x, y)
    return far
