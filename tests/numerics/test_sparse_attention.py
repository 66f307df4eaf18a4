"""Attention to chosen tiles is softmax with all other image keys hidden, and tiles are chosen by their means."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics import sparse_attention as sparse
from ditq.numerics.sparse_attention import (
    covered,
    number_of_tiles,
    sparse_attention,
    tile_probabilities,
    tile_scores,
    tiles_of,
)
from ditq.numerics.token_layout import Grid
from tests.numerics.test_local_attention import SIDES, tensors

SCALE = 0.25
# float32 sums of at most 100 products of 16 channels: a few units of 2^-24 of values of order 1.
CLOSE = 5e-6
GRIDS = [Grid(text, *sides, text_first) for sides in SIDES for text, text_first in ((5, True), (3, False), (0, True))]


def tile_of(token: int, tile: int, grid: Grid) -> int:
    """By the definition: tiles are counted along rows of tiles."""
    row, column = divmod(token, grid.width)
    return row // tile * math.ceil(grid.width / tile) + column // tile


def means(tokens: Tensor, tile: int, grid: Grid) -> Tensor:
    """Of image tokens [B, h, HW, d], in float64; beyond an edge the last row and column stand again."""
    found = []
    for top in range(0, grid.height, tile):
        for left in range(0, grid.width, tile):
            total = torch.zeros_like(tokens[:, :, 0], dtype=torch.float64)
            for row in range(top, top + tile):
                for column in range(left, left + tile):
                    place = min(row, grid.height - 1) * grid.width + min(column, grid.width - 1)
                    total += tokens[:, :, place].double()
            found.append(total / tile**2)
    return torch.stack(found, 2)


def brute_force(given: list[Tensor], grid: Grid, tile: int, seen: Tensor) -> Tensor:
    """softmax in float64 with all image keys hidden that are not of a seen tile; seen [B, h, T, k]."""
    query, key, value = (tensor.double() for tensor in given)
    scores = query @ key.transpose(-1, -2) * SCALE
    start = grid.text if grid.text_first else 0
    for sample in range(2):
        for head in range(3):
            for one in range(grid.image):
                row = seen[sample, head, tile_of(one, tile, grid)].tolist()
                for other in range(grid.image):
                    if tile_of(other, tile, grid) not in row:
                        scores[sample, head, start + one, start + other] = -math.inf
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("tile", "keep"), [(2, 3), (3, 2), (4, 1)])
def test_tiles_that_were_chosen_before_are_those_that_are_seen(tile: int, keep: int, grid: Grid) -> None:
    count = number_of_tiles(tile, grid.height, grid.width)
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(3, count, count, generator=generator).argsort(-1)[..., :keep].int()
    given = tensors(grid)
    found = sparse_attention(*given, grid, SCALE, tile, keep, seen)
    assert (found - brute_force(given, grid, tile, seen[None].expand(2, -1, -1, -1))).abs().max() < CLOSE


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("tile", "keep"), [(2, 3), (3, 2), (4, 1)])
def test_tiles_are_chosen_by_the_mean_score_and_the_own_is_always_one(tile: int, keep: int, grid: Grid) -> None:
    given = tensors(grid)
    scores = means(grid.parted(given[0])[0], tile, grid) @ means(grid.parted(given[1])[0], tile, grid).transpose(-1, -2)
    for place in range(scores.shape[-1]):
        scores[:, :, place, place] = math.inf
    seen = scores.argsort(-1, descending=True)[..., :keep]
    found = sparse_attention(*given, grid, SCALE, tile, keep)
    assert (found - brute_force(given, grid, tile, seen)).abs().max() < CLOSE


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_tiles_are_all_of_the_attention(grid: Grid) -> None:
    given = tensors(grid)
    exact = (given[0].double() @ given[1].double().transpose(-1, -2) * SCALE).softmax(-1) @ given[2].double()
    for rest in (True, False):
        assert (sparse_attention(*given, grid, SCALE, 3, 100, means=rest) - exact).abs().max() < CLOSE


@pytest.mark.parametrize("chosen", [True, False], ids=["before", "at the call"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("tile", "keep"), [(2, 3), (3, 2), (4, 1)])
def test_tiles_that_are_not_seen_stand_as_their_means(tile: int, keep: int, grid: Grid, chosen: bool) -> None:
    """softmax in float64 with, for each query, the tokens of its seen tiles, the text, and n times exp(q mean k) of others."""
    query, key, value = given = tensors(grid)
    count, start = number_of_tiles(tile, grid.height, grid.width), grid.text if grid.text_first else 0
    small = [means(grid.parted(each)[0], tile, grid) for each in (key, value)]
    if chosen:
        seen = torch.rand(2, 3, count, count, generator=torch.Generator().manual_seed(2)).argsort(-1)[:1, ..., :keep]
        found = sparse_attention(*given, grid, SCALE, tile, keep, seen[0].int(), means=True)
        seen = seen.expand(2, -1, -1, -1)
    else:
        scores = means(grid.parted(query)[0], tile, grid) @ small[0].transpose(-1, -2)
        scores.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        seen = scores.argsort(-1, descending=True)[..., :keep]
        found = sparse_attention(*given, grid, SCALE, tile, keep, means=True)
    members = [[token for token in range(grid.image) if tile_of(token, tile, grid) == t] for t in range(count)]
    expected = F.scaled_dot_product_attention(*(each.double() for each in given), scale=SCALE)  # of text
    text = [token for token in range(grid.text + grid.image) if not start <= token < start + grid.image]
    for sample, head, one in product(range(2), range(3), range(grid.image)):
        row = seen[sample, head, tile_of(one, tile, grid)].tolist()
        keys = [*text, *(start + token for t in row for token in members[t])]
        others = [t for t in range(count) if t not in row]
        q, k, v = (each[sample, head].double() for each in given)
        weights = (torch.cat([k[keys], small[0][sample, head, others]]) @ q[start + one] * SCALE).exp()
        weights[len(keys) :] *= torch.tensor([len(members[t]) for t in others])
        mixed = torch.cat([v[keys], small[1][sample, head, others]])
        expected[sample, head, start + one] = weights @ mixed / weights.sum()
    assert (found - expected).abs().max() < CLOSE


def test_means_are_exact_where_the_keys_of_a_tile_are_alike() -> None:
    grid = Grid(5, 8, 8, True)
    query, key, value = tensors(grid)
    alike = key.clone()
    for one in range(16):
        members = [5 + token for token in range(64) if tile_of(token, 2, grid) == one]
        alike[:, :, members] = key[:, :, members].mean(2, keepdim=True)
    exact = F.scaled_dot_product_attention(query.double(), alike.double(), value.double(), scale=SCALE)
    assert (sparse_attention(query, alike, value, grid, SCALE, 2, 2, means=True) - exact).abs().max() < CLOSE
    assert (sparse_attention(query, alike, value, grid, SCALE, 2, 2) - exact).abs().max() > 0.01


@pytest.mark.parametrize("scores", [sparse.SCORES, 1000], ids=["at once", "in parts"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_tiles_have_of_the_probability_is_measured(
    grid: Grid, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "SCORES", scores)
    tile, (query, key, _) = 3, tensors(grid)
    count = number_of_tiles(tile, grid.height, grid.width)
    found, text = tile_probabilities(query, key, grid, tile, SCALE)
    weights = (query.double() @ key.double().transpose(-1, -2) * SCALE).softmax(-1)
    start = grid.text if grid.text_first else 0
    expected, members = torch.zeros(2, 3, count, count, dtype=torch.float64), torch.zeros(count)
    for one in range(grid.image):
        members[tile_of(one, tile, grid)] += 1
        for other in range(grid.image):
            places = (tile_of(one, tile, grid), tile_of(other, tile, grid))
            expected[:, :, places[0], places[1]] += weights[:, :, start + one, start + other]
    expected /= members[:, None]
    assert (found - expected).abs().max() < CLOSE and (text - (1 - expected.sum(-1))).abs().max() < CLOSE
    best = covered(found, text, found.argsort(-1, descending=True))
    assert bool((best.diff() >= 0).all()) and float(best[-1]) == pytest.approx(1, abs=CLOSE)
    first = expected.amax(-1) + 1 - expected.sum(-1)
    assert float(best[0]) == pytest.approx(float(first.mean()), abs=CLOSE)


def test_scores_of_tiles_are_mean_scores_of_their_tokens() -> None:
    query, key = (torch.randn(1, 2, 4, 9, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    pairs = torch.einsum("bhsid,bhtjd->bhstij", query.double(), key.double()).mean((-1, -2))
    found = tile_scores(query, key)
    apart = ~torch.eye(4, dtype=torch.bool)
    assert (found - pairs)[:, :, apart].abs().max() < CLOSE and bool(found[:, :, ~apart].isinf().all())


def test_tokens_that_stand_again_beyond_an_edge_are_told_apart() -> None:
    assert tiles_of(4, 8, 12).real is None
    made = tiles_of(3, 4, 7)
    assert made.real is not None and int(made.real.sum()) == 28
    assert sorted(made.tokens[made.real].tolist()) == list(range(28))
