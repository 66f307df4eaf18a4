"""Windows over a picture or a video: which image tokens each image token attends to, and the blocks in which that is computed.

Tokens of one tile are queries of one block and share its keys, a rectangle of the picture, or of each of some frames. So a
window costs a gather and batched products whose number grows with the picture, not with its square.

Sides are rows and columns, or frames, rows and columns: a picture is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, Literal

import numpy as np

from ditq.numerics.token_order import TokenOrder

Shape = Literal["circle", "tiles"]
SHAPES: tuple[Shape, ...] = ("circle", "tiles")
ALL = 2**30  # more tokens than any side has


@dataclass(frozen=True)
class Side:
    """Along one side of the picture or video a block has `tile` queries, and `extent` keys from `before` in front of them on,
    moved inwards at its ends; no more than there are.
    """

    tile: int
    before: int
    extent: int


@dataclass(frozen=True)
class Window:
    """`circle`: a query sees the keys with dy^2 + dx^2 < size^2 (CLEAR, Liu 2024, arXiv 2412.16112).

    `tiles`: all queries of a tile see the same size x size tiles, its own in their middle; at an edge of the picture the
    square is moved inwards, so that it keeps its size (Sliding Tile Attention, Zhang 2025, arXiv 2502.04507). Where the
    picture is no whole number of tiles it is moved by single tokens, and always lies inside.

    `tile`: queries of tile x tile tokens are a block; for a circle that is only how it is computed, not what.

    Of a video both are seen in `frames` tiles of `tile_frames` frames, the query's own in their middle, moved inwards in the
    same way; 0: in all frames. A block then has the queries of tile_frames frames.
    """

    shape: Shape
    size: int
    tile: int
    frames: int = 0
    tile_frames: int = 1

    def __post_init__(self) -> None:
        least = min(self.size, self.tile, self.tile_frames)
        if self.shape not in SHAPES or least < 1 or self.frames < 0:
            raise ValueError(
                "a window is circle or tiles, with a size and tiles of at least 1, in no less than 0 frames"
            )

    @property
    def sides(self) -> tuple[Side, Side, Side]:
        """Along frames, rows and columns."""
        time = _tiles(self.frames, self.tile_frames) if self.frames else Side(self.tile_frames, 0, ALL)
        space = _tiles(self.size, self.tile)
        if self.shape == "circle":
            space = Side(self.tile, self.size - 1, self.tile + 2 * (self.size - 1))
        return time, space, space

    @property
    def block(self) -> int:
        """Queries of a block."""
        return prod(side.tile for side in self.sides)

    def covers(self, *sides: int) -> bool:
        """Whether every query sees everything."""
        lengths = frames, height, width = three(sides)
        if self.shape == "circle":
            return self.sides[0].extent >= frames and (height - 1) ** 2 + (width - 1) ** 2 < self.size**2
        return all(side.extent >= length for side, length in zip(self.sides, lengths, strict=True))

    def extents(self, *sides: int) -> tuple[int, int, int]:
        """Keys that are multiplied with each query, along frames, rows and columns."""
        time, down, across = (min(side.extent, length) for side, length in zip(self.sides, three(sides), strict=True))
        return time, down, across

    def keys_a_query(self, *sides: int) -> int:
        """Image tokens that are multiplied with each query."""
        return prod(self.extents(*sides))

    def spec(self) -> dict[str, Any]:
        """As JSON."""
        found = {"shape": self.shape, "size": self.size, "tile": self.tile}
        in_time = {"frames": self.frames, "tile_frames": self.tile_frames}
        return found | (in_time if in_time != {"frames": 0, "tile_frames": 1} else {})


def _tiles(size: int, tile: int) -> Side:
    return Side(tile, size // 2 * tile, size * tile)


def three(sides: Sequence[int]) -> tuple[int, int, int]:
    """Frames, rows and columns; of a picture there is one frame."""
    frames, height, width = (1, *sides)[-3:]
    return frames, height, width


@dataclass(frozen=True, eq=False)
class Blocks:
    """Indices of image tokens: `queries` [T, Q] and `keys` [T, K] of each of T blocks, and `places` [FHW], where each token is
    found among all queries of the blocks. `seen`: bool [T, Q, K], None where all is.

    At an edge that is no whole tile a block's queries repeat the last frame, row or column. Arrays, for what is kept between
    calls must be no tensor of a mode (of fake tensors, of inference) that a call happened to be in.
    """

    queries: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    seen: np.ndarray | None

    @property
    def in_place(self) -> bool:
        """Whether the tokens lie in memory as the blocks' queries do, each once."""
        return self.queries.size == len(self.places) and bool((self.places == np.arange(len(self.places))).all())


@lru_cache(maxsize=64)
def blocks(window: Window, *sides: int, order: TokenOrder | None = None) -> Blocks:
    """The blocks of a picture of so many rows and columns of tokens, or of a video, that lie in that order."""
    lengths = _, height, width = three(sides)
    if order is not None:
        made, places = blocks(window, *sides), order.places(*lengths)
        return Blocks(places[made.queries], places[made.keys], made.places[order.listed(*lengths)], made.seen)
    query_places, key_places = [], []
    for side, length in zip(window.sides, lengths, strict=True):
        count = -(-length // side.tile)
        starts = np.clip(np.arange(count) * side.tile - side.before, 0, max(length - side.extent, 0))
        query_places.append(_from_tiles(side.tile, length))
        key_places.append(starts[:, None] + np.arange(min(side.extent, length)))
    queries, keys = _crossed(query_places, lengths), _crossed(key_places, lengths)
    block = inside = np.zeros(lengths, np.int64)
    for coordinate, side, length in zip(np.indices(lengths), window.sides, lengths, strict=True):
        block = block * -(-length // side.tile) + coordinate // side.tile
        inside = inside * side.tile + coordinate % side.tile
    places = (block * window.block + inside).reshape(-1)
    seen = None
    if window.shape == "circle":
        (query_rows, query_columns), (key_rows, key_columns) = (
            divmod(tokens % (height * width), width) for tokens in (queries, keys)
        )
        seen = np.empty((*queries.shape, keys.shape[1]), bool)
        for number in range(len(queries)):  # one at a time: whole numbers of all pairs would take 30 times as much
            down = query_rows[number, :, None] - key_rows[number]
            right = query_columns[number, :, None] - key_columns[number]
            seen[number] = down**2 + right**2 < window.size**2
    return Blocks(queries, keys, places, seen)


def _from_tiles(tile: int, length: int) -> np.ndarray:
    """Places of each tile along a side, the last one repeated beyond its end: int64 [C, tile]."""
    return np.minimum(np.arange(-(-length // tile) * tile), length - 1).reshape(-1, tile)


def _crossed(places: Sequence[np.ndarray], lengths: Sequence[int]) -> np.ndarray:
    """Tokens at every place that each block has along each side, [C, c] of them: int64 [product of C, product of c]."""
    count = len(places)
    tokens = np.zeros((1,) * 2 * count, np.int64)
    for number, (along, length) in enumerate(zip(places, lengths, strict=True)):
        others = [axis for axis in range(2 * count) if axis % count != number]
        tokens = tokens * length + np.expand_dims(along, others)
    return tokens.reshape(prod(len(along) for along in places), -1)


@lru_cache(maxsize=64)
def patches(patch: int, *sides: int, order: TokenOrder | None = None) -> np.ndarray:
    """Tokens of each patch x patch square, of each frame: int64 [P, patch^2]. Beyond an edge the last row or column stands
    again."""
    lengths = frames, height, width = three(sides)
    if order is not None:
        return np.asarray(order.places(*lengths)[patches(patch, *sides)])
    places = [np.arange(frames)[:, None], _from_tiles(patch, height), _from_tiles(patch, width)]
    return _crossed(places, lengths)


def number_of_patches(patch: int, *sides: int) -> int:
    """P."""
    frames, height, width = three(sides)
    return frames * -(-height // patch) * -(-width // patch)
