"""LocalAttention: image tokens attend to a window of the picture and to all text (numerics/local_attention.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.structural import register
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.head_windows import by_heads, grouped, order_of
from ditq.numerics.local_attention import Pooling, local_attention
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.numerics.window import Window, number_of_patches

Given = Window | Mapping[str, Any] | None


@register
class LocalAttention(TokenAttention):
    """softmax over a window, the text and, with `pool` above 0, every pool x pool tokens as one key and value more.

    `window`: of all heads, or a list with one for each, None where a head sees all.
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
        window: Given | Sequence[Given],
        pool: int = 0,
    ) -> None:
        super().__init__(site, layout, heads, width, text, usual)
        self.windows = windows_of(window, heads)
        self.groups = grouped(self.windows)
        self.order = order_of(self.groups)
        self.pool = pool
        if pool:
            shares = torch.full((heads, pool**2), pool**-2)
            self.pool_keys = nn.Parameter(shares, requires_grad=False)
            self.pool_values = nn.Parameter(shares.clone(), requires_grad=False)

    @property
    def pooling(self) -> Pooling | None:
        """What is seen beside the windows."""
        return Pooling(self.pool, self.pool_keys, self.pool_values) if self.pool else None

    def attention(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        return by_heads(local_attention, query, key, value, grid, self.groups, self.order, scale, self.pooling)

    def macs(self, grid: Grid) -> int:
        return sum(self.macs_a_head(window, grid) for window in self.windows)

    def macs_a_head(self, window: Window | None, grid: Grid) -> int:
        """Of one that has this window."""
        tokens = grid.text + grid.image
        if window is None:
            return int(2 * self.width * tokens**2)
        pooled = number_of_patches(self.pool, *grid.sides) if self.pool else 0
        pairs = grid.image * (window.keys_a_query(*grid.sides) + grid.text + pooled)
        return int(2 * self.width * (pairs + grid.text * tokens))

    def settings(self) -> dict[str, Any]:
        specs = [None if window is None else window.spec() for window in self.windows]
        return {"window": specs[0] if len(self.groups) == 1 else specs, "pool": self.pool}

    def extra_repr(self) -> str:
        pooled = f", {self.pool} x {self.pool} pooled" if self.pool else ""
        return f"{told(self.windows)}{pooled}"


def windows_of(given: Given | Sequence[Given], heads: int) -> tuple[Window | None, ...]:
    """One for each head, of what a spec says."""
    each = given if isinstance(given, Sequence) else [given] * heads
    if len(each) != heads:
        raise ValueError(f"{len(each)} windows are not those of {heads} heads")
    found = tuple(Window(**window) if isinstance(window, Mapping) else window for window in each)
    if not all(window is None or isinstance(window, Window) for window in found):
        raise ValueError(f"windows are described by mappings, not as {given!r}")
    return found


def told(windows: Sequence[Window | None]) -> str:
    """Windows in a few words; of heads that differ, how many have which."""
    counted = Counter(windows)
    if len(counted) == 1:
        return _told(windows[0])
    return ", ".join(f"{_told(window)} for {number}" for window, number in counted.items())


def _told(window: Window | None) -> str:
    if window is None:
        return "all"
    in_time = f" in {window.frames} tiles of {window.tile_frames} frames" if window.frames else ""
    return f"{window.shape} {window.size}{in_time}"
