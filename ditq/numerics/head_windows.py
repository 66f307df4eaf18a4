"""A window for each head of an attention (Sliding Tile Attention searches such too, Zhang 2025, arXiv 2502.04507).

Heads of one window are gathered and computed together, and then put back in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ditq.numerics.local_attention import Pooling, on
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Window


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one window, by number [n]; None: they see all."""

    window: Window | None
    numbers: np.ndarray


def grouped(windows: Sequence[Window | None]) -> list[Heads]:
    """Of a window for each head."""
    return [
        Heads(window, np.array([number for number, other in enumerate(windows) if other == window]))
        for window in dict.fromkeys(windows)
    ]


def order_of(groups: Sequence[Heads]) -> np.ndarray:
    """Where each head [h] stands among those of all groups."""
    return np.argsort(np.concatenate([group.numbers for group in groups]))


class Attention(Protocol):
    """Such as `local_attention`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: Grid,
        window: Window | None,
        scale: float,
        pooling: Pooling | None,
    ) -> Tensor: ...


def by_heads(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    groups: Sequence[Heads],
    order: np.ndarray,
    scale: float,
    pooling: Pooling | None = None,
) -> Tensor:
    """`attention` of each group of heads with its window: [B, h, N, d]. `order`: as `order_of` the groups."""
    if len(groups) == 1:
        return attention(query, key, value, grid, groups[0].window, scale, pooling)
    found = []
    for group in groups:
        heads = on(query, group.numbers)
        shares = None if pooling is None else Pooling(pooling.patch, pooling.keys[heads], pooling.values[heads])
        found.append(attention(query[:, heads], key[:, heads], value[:, heads], grid, group.window, scale, shares))
    return torch.cat(found, 1)[:, on(query, order)]
