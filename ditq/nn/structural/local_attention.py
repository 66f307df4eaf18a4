"""LocalAttention: image tokens attend to a window of the picture and to all text (numerics/local_attention.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.structural import register
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.local_attention import Pooling, local_attention
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.numerics.window import Window, number_of_patches


@register
class LocalAttention(TokenAttention):
    """softmax over a window, the text and, with `pool` above 0, every pool x pool tokens as one key and value more.

    `pool_keys` and `pool_values` [heads, pool^2] are the weights of those sums, divided by their own sum; at first all alike.
    """

    kind: ClassVar[str] = "local_attention"

    def __init__(
        self,
        site: str,
        layout: TokenLayout,
        heads: int,
        width: int,
        text: bool,
        usual: int,
        window: Window | Mapping[str, Any],
        pool: int = 0,
    ) -> None:
        super().__init__(site, layout, heads, width, text, usual)
        self.window = window if isinstance(window, Window) else Window(**window)
        self.pool = pool
        if pool:
            shares = torch.full((heads, pool**2), pool**-2)
            self.pool_keys = nn.Parameter(shares, requires_grad=False)
            self.pool_values = nn.Parameter(shares.clone(), requires_grad=False)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        pooling = Pooling(self.pool, self.pool_keys, self.pool_values) if self.pool else None
        return local_attention(query, key, value, grid, self.window, scale, pooling)

    def macs(self, grid: Grid) -> int:
        pooled = number_of_patches(self.pool, *grid.sides) if self.pool else 0
        pairs = grid.image * (self.window.keys_a_query(*grid.sides) + grid.text + pooled)
        return 2 * self.heads * self.width * (pairs + grid.text * (grid.text + grid.image))

    def settings(self) -> dict[str, Any]:
        return {"window": self.window.spec(), "pool": self.pool}

    def extra_repr(self) -> str:
        pooled = f", {self.pool} x {self.pool} pooled" if self.pool else ""
        return f"{self.window.shape} {self.window.size}{pooled}"
