"""Attention to squares of the picture is softmax over their sums, each with the weight of the tokens that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ditq.numerics.compressed_keys import compressed_attention, is_even, log_counts
from ditq.numerics.local_attention import Pooling
from ditq.numerics.token_layout import Grid
from tests.numerics.test_local_attention import SIDES, tensors

SCALE = 0.25
# float32 sums of at most 100 products of 16 channels: a few units of 2^-24 of values of order 1.
CLOSE = 5e-6


def squares(patch: int, grid: Grid) -> list[list[int]]:
    """The image tokens of each square, by the definition; at an edge there are fewer."""
    found: dict[tuple[int, int], list[int]] = {}
    for token in range(grid.image):
        row, column = divmod(token, grid.width)
        found.setdefault((row // patch, column // patch), []).append(token)
    return list(found.values())


def brute_force(given: list[Tensor], grid: Grid, shares: Tensor, patch: int, gain: Tensor | None) -> Tensor:
    """In float64, one square after the other. shares [h, patch^2]; at an edge the last row and column stand again."""
    query, (image_key, text_key), (image_value, text_value) = (
        given[0].double(),
        *(grid.parted(tokens.double()) for tokens in given[1:]),
    )
    keys, values, added = [], [], []
    for square in squares(patch, grid):
        top, left = divmod(square[0], grid.width)
        sums = [torch.zeros(2, 3, 16, dtype=torch.float64) for _ in range(2)]
        for number in range(patch**2):
            row = min(top + number // patch, grid.height - 1)
            column = min(left + number % patch, grid.width - 1)
            share = (shares[:, number] / shares.sum(1)).double()[None, :, None]
            for total, tokens in zip(sums, (image_key, image_value), strict=True):
                total += share * tokens[:, :, row * grid.width + column]
        keys.append(sums[0])
        values.append(sums[1])
        added.append(math.log(len(square)) + (torch.zeros(3) if gain is None else gain).double())
    scores = query @ torch.cat([text_key, torch.stack(keys, 2)], 2).transpose(-1, -2) * SCALE
    scores[..., grid.text :] += torch.stack(added, 1)[None, :, None]
    return scores.softmax(-1) @ torch.cat([text_value, torch.stack(values, 2)], 2)


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("patch", [2, 3])
def test_all_tokens_attend_to_the_text_and_to_squares(patch: int, sides: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    shares = torch.rand(3, patch**2, generator=generator) + 0.1
    for text, text_first in ((5, True), (3, False), (0, True)):
        grid, gain = Grid(text, *sides, text_first), torch.randn(3, generator=generator) if text else None
        given = tensors(grid)
        found = compressed_attention(*given, grid, SCALE, Pooling(patch, shares, 2 * shares), True, gain)
        assert (found - brute_force(given, grid, shares, patch, gain)).abs().max() < CLOSE


@pytest.mark.parametrize("text_first", [True, False])
def test_squares_of_equal_tokens_lose_nothing(text_first: bool) -> None:
    """n equal keys of one softmax weigh n exp(s): so does one key with the logarithm of their number, and only with it."""
    for sides in SIDES:
        grid, patch = Grid(4, *sides, text_first), 2
        query, key, value = tensors(grid)
        start = grid.text if text_first else 0
        for square in squares(patch, grid):
            for tokens in (key, value):
                tokens[:, :, [start + place for place in square]] = tokens[:, :, start + square[0], None]
        pooling = Pooling(patch, torch.ones(3, 4), torch.ones(3, 4))
        exact = (query.double() @ key.double().transpose(-1, -2) * SCALE).softmax(-1) @ value.double()
        found = compressed_attention(query, key, value, grid, SCALE, pooling)
        assert (found - exact).abs().max() < CLOSE
        uncounted = compressed_attention(query, key, value, grid, SCALE, pooling, count=False)
        assert (uncounted - exact).abs().max() > 1e-2


def test_squares_at_an_edge_count_the_tokens_that_they_have() -> None:
    for patch, sides in ((2, (3, 5)), (3, (8, 7)), (2, (4, 4))):
        counts = [len(square) for square in squares(patch, Grid(0, *sides))]
        assert log_counts(patch, *sides).tolist() == pytest.approx([math.log(count) for count in counts])
        assert is_even(patch, Grid(0, *sides)) == (len(set(counts)) == 1)
    assert not is_even(2, Grid(1, 4, 4))
