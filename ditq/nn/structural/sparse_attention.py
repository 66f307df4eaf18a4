"""SparseAttention: each tile of the picture attends to some tiles of it and to all text (numerics/sparse_attention.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ditq.nn.structural import register
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.sparse_attention import number_of_tiles, sparse_attention
from ditq.numerics.token_layout import Grid, TokenLayout


@register
class SparseAttention(TokenAttention):
    """softmax over `keep` tiles of tile x tile tokens and the text and, with `means`, the means of all other tiles.

    `seen` [heads, T, keep] are the tiles that each one sees, where they were found before; they are of a `picture` of so many
    rows and columns, and the part runs for no other. Without a picture they are chosen at each call.
    """

    kind: ClassVar[str] = "sparse_attention"
    over_tiles = staticmethod(sparse_attention)  # a GPU's own takes its place in a part

    def __init__(
        self,
        site: str,
        layout: TokenLayout,
        heads: int,
        width: int,
        text: bool,
        usual: int,
        tile: int,
        keep: int,
        picture: Sequence[int] | None = None,
        means: bool = False,
    ) -> None:
        super().__init__(site, layout, heads, width, text, usual)
        self.tile, self.keep, self.means = tile, keep, means
        self.picture = None if picture is None else (picture[0], picture[1])
        self.seen: Tensor | None
        first = None
        if self.picture is not None:
            first = torch.arange(keep, dtype=torch.int32).repeat(heads, number_of_tiles(tile, *self.picture), 1)
        self.register_buffer("seen", first)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        if self.picture is not None and (grid.height, grid.width) != self.picture:
            if isinstance(query, FakeTensor):  # a trace asks for shapes, and knows no more of a picture than its tokens
                return query.new_empty(query.shape)
            raise ValueError(f"{self.site}: {other_picture(self.picture, (grid.height, grid.width))}")
        return self.over_tiles(query, key, value, grid, scale, self.tile, self.keep, self.seen, self.means)

    def macs(self, grid: Grid) -> int:
        tiles, channels = number_of_tiles(self.tile, *grid.sides), self.heads * self.width
        keys = min(self.keep, tiles) * self.tile**2 + grid.text + tiles * self.means
        pairs = grid.image * keys + grid.text * (grid.text + grid.image)
        choice = tiles**2 if self.picture is None else 0
        return channels * (2 * pairs + choice)

    def tensors(self) -> list[Tensor]:
        return [] if self.seen is None else [self.seen]

    def settings(self) -> dict[str, Any]:
        picture = None if self.picture is None else list(self.picture)
        return {"tile": self.tile, "keep": self.keep, "picture": picture, "means": self.means}

    def extra_repr(self) -> str:
        rest = ", means of the rest" if self.means else ""
        return f"{self.keep} tiles of {self.tile} x {self.tile}{rest}"


def other_picture(made_for: tuple[int, int], given: tuple[int, int]) -> str:
    """What is wrong, and what to do."""
    pictures = " x ".join(map(str, made_for)), " x ".join(map(str, given))
    return (
        f"which tiles are seen was found for pictures of {pictures[0]} tokens, not of {pictures[1]}; ask for that size, or "
        "compile with sparse_attention's blocks: online"
    )
