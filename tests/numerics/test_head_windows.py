"""Heads with windows of their own: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch

from ditq.numerics.head_windows import by_heads, grouped, order_of
from ditq.numerics.local_attention import Pooling, local_attention
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Window
from tests.numerics.test_local_attention import keep, softmax, tensors

NARROW, WIDE, ROUND = Window("tiles", 1, 3), Window("tiles", 3, 2, 1, 2), Window("circle", 3, 2)


@pytest.mark.parametrize("windows", [(NARROW, None, NARROW), (ROUND, WIDE, None), (WIDE, WIDE, WIDE)], ids=str)
@pytest.mark.parametrize("grid", [Grid(4, 7, 5), Grid(0, 5, 4, frames=3)], ids=str)
def test_each_head_is_softmax_over_its_own_window(windows: tuple[Window | None, ...], grid: Grid) -> None:
    query, key, value = (tensor.double() for tensor in tensors(grid))
    groups = grouped(windows)
    assert len(groups) == len(set(windows))  # heads of one window are computed together
    found = by_heads(local_attention, query, key, value, grid, groups, order_of(groups), 0.25)
    for head, window in enumerate(windows):
        count = grid.text + grid.image
        seen = torch.ones(count, count, dtype=torch.bool) if window is None else keep(window, grid)
        expected = softmax(query[:, head], key[:, head], value[:, head], seen, 0.25)
        assert (found[:, head] - expected).abs().max() < 1e-13


def test_each_head_keeps_its_own_weights_of_pooled_keys() -> None:
    grid, windows = Grid(4, 7, 5), (NARROW, ROUND, NARROW)
    given = [tensor.double() for tensor in tensors(grid)]
    keys, values = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = grouped(windows)
    found = by_heads(local_attention, *given, grid, groups, order_of(groups), 0.25, Pooling(2, keys, values))
    for head, window in enumerate(windows):
        one = slice(head, head + 1)
        alone = local_attention(*(t[:, one] for t in given), grid, window, 0.25, Pooling(2, keys[one], values[one]))
        assert (found[:, one] - alone).abs().max() < 1e-13
