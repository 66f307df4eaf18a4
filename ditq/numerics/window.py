"""Windows over a picture: which image tokens each image token attends to, and the blocks in which that is computed.

Tokens of one tile are queries of one block and share its keys, a rectangle of the picture. So a window costs a gather and
batched products whose number grows with the picture, not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

Shape = Literal["circle", "tiles"]
SHAPES: tuple[Shape, ...] = ("circle", "tiles")


@dataclass(frozen=True)
class Window:
    """`circle`: a query sees the keys with dy^2 + dx^2 < size^2 (CLEAR, Liu 2024, arXiv 2412.16112).

    `tiles`: all queries of a tile see the same size x size tiles, its own in their middle; at an edge of the picture the
    square is moved inwards, so that it keeps its size (Sliding Tile Attention, Zhang 2025, arXiv 2502.04507). Where the
    picture is no whole number of tiles it is moved by single tokens, and always lies inside.

    `tile`: queries of tile x tile tokens are a block; for a circle that is only how it is computed, not what.
    """

    shape: Shape
    size: int
    tile: int

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.size < 1 or self.tile < 1:
            raise ValueError("a window is circle or tiles, with a size and a tile of at least 1")

    @property
    def before(self) -> int:
        """Tokens of a block's keys in front of its queries, along one side."""
        return self.size - 1 if self.shape == "circle" else self.size // 2 * self.tile

    @property
    def extent(self) -> int:
        """Tokens of a block's keys along one side, where the picture has as many."""
        return self.tile + 2 * (self.size - 1) if self.shape == "circle" else self.size * self.tile

    def covers(self, height: int, width: int) -> bool:
        """Whether every query sees the whole picture."""
        if self.shape == "circle":
            return (height - 1) ** 2 + (width - 1) ** 2 < self.size**2
        return self.extent >= max(height, width)

    def keys_a_query(self, height: int, width: int) -> int:
        """Image tokens that are multiplied with each query."""
        return min(self.extent, height) * min(self.extent, width)

    def spec(self) -> dict[str, Any]:
        """As JSON."""
        return {"shape": self.shape, "size": self.size, "tile": self.tile}


@dataclass(frozen=True, eq=False)
class Blocks:
    """Indices of image tokens in row-major order: `queries` [T, t^2] and `keys` [T, K] of each of T blocks, and `places`
    [HW], where each token is found among all queries of the blocks. `seen`: bool [T, t^2, K], None where all is.

    At an edge that is no whole tile a block's queries repeat the last row or column. Arrays, for what is kept between calls
    must be no tensor of a mode (of fake tensors, of inference) that a call happened to be in.
    """

    queries: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    seen: np.ndarray | None


@lru_cache(maxsize=64)
def blocks(window: Window, height: int, width: int) -> Blocks:
    """The blocks of a picture of height x width tokens."""
    tile, extent = window.tile, window.extent
    sides = []
    for length in (height, width):
        count = -(-length // tile)
        starts = np.clip(np.arange(count) * tile - window.before, 0, max(length - extent, 0))
        queries = np.minimum(np.arange(count * tile), length - 1).reshape(count, tile)
        sides.append((queries, starts[:, None] + np.arange(min(extent, length))))
    (query_rows, key_rows), (query_columns, key_columns) = sides
    queries = _crossed(query_rows, query_columns, width)
    keys = _crossed(key_rows, key_columns, width)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    block = rows // tile * len(query_columns) + columns // tile
    places = (block * tile + rows % tile) * tile + columns % tile
    seen = None
    if window.shape == "circle":
        down = (queries // width)[:, :, None] - (keys // width)[:, None, :]
        right = (queries % width)[:, :, None] - (keys % width)[:, None, :]
        seen = down**2 + right**2 < window.size**2
    return Blocks(queries, keys, places.reshape(-1), seen)


def _crossed(rows: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """Tokens at every row of a block [R, r] and every column of a block [C, c]: int64 [R C, r c]."""
    tokens = rows[:, None, :, None] * width + columns[None, :, None, :]
    return tokens.reshape(len(rows) * len(columns), -1)


@lru_cache(maxsize=64)
def patches(patch: int, height: int, width: int) -> np.ndarray:
    """Tokens of each patch x patch square: int64 [P, patch^2]. Beyond an edge the last row or column stands again."""
    sides = [
        np.minimum(np.arange(-(-length // patch) * patch), length - 1).reshape(-1, patch) for length in (height, width)
    ]
    return _crossed(sides[0], sides[1], width)
