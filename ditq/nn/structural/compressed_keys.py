"""CompressedKeys: all tokens attend to the text and to squares of the picture (numerics/compressed_keys.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.structural import register
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.compressed_keys import compressed_attention
from ditq.numerics.local_attention import Pooling
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.numerics.window import number_of_patches


@register
class CompressedKeys(TokenAttention):
    """softmax over the text and one key for every factor x factor image tokens.

    `pool_keys` and `pool_values` [heads, factor^2] are the weights of those sums, divided by their own sum; at first all alike.
    They are the same for all channels of a head, and add up to 1: so rotations and shifts pass through.
    `gain` [heads], 0 at first, is what keys of squares weigh beside the logarithm of their number; only where there is text.
    """

    kind: ClassVar[str] = "compress_keys"

    def __init__(
        self,
        site: str,
        layout: TokenLayout,
        heads: int,
        width: int,
        text: bool,
        usual: int,
        factor: int,
        count: bool = True,
    ) -> None:
        super().__init__(site, layout, heads, width, text, usual)
        self.what = "attention to compressed keys"
        self.factor, self.count = factor, count
        shares = torch.full((heads, factor**2), factor**-2)
        self.pool_keys = nn.Parameter(shares, requires_grad=False)
        self.pool_values = nn.Parameter(shares.clone(), requires_grad=False)
        self.gain = nn.Parameter(torch.zeros(heads), requires_grad=False) if text else None

    def attention(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        pooling = Pooling(self.factor, self.pool_keys, self.pool_values)
        return compressed_attention(query, key, value, grid, scale, pooling, self.count, self.gain)

    def macs(self, grid: Grid) -> int:
        tokens, squares = grid.text + grid.image, number_of_patches(self.factor, *grid.sides)
        return 2 * self.heads * self.width * (tokens * (grid.text + squares) + grid.image)

    def settings(self) -> dict[str, Any]:
        return {"factor": self.factor, "count": self.count}

    def extra_repr(self) -> str:
        return f"{self.factor} x {self.factor}"
