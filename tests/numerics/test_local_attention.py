"""Windows see what they are defined to see, and attention in blocks is softmax with all other keys hidden."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ditq.numerics.local_attention import Pooling, local_attention, temperature
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Window, blocks

WINDOWS = [
    Window("circle", 1, 2),
    Window("circle", 3, 4),
    Window("circle", 5, 8),
    Window("tiles", 1, 4),
    Window("tiles", 2, 3),
    Window("tiles", 3, 2),
]
SIDES = [(8, 8), (7, 10), (3, 9)]  # whole tiles, broken ones, fewer rows than a window has
VIDEOS = [
    (Window("tiles", 3, 2, 3, 2), (7, 9, 7)),
    (Window("tiles", 2, 3, 1, 4), (6, 8, 4)),
    (Window("tiles", 1, 4, 5, 1), (3, 9, 5)),  # fewer frames than a window has
    (Window("tiles", 1, 3, 0, 2), (5, 7, 4)),  # all frames
    (Window("circle", 3, 4, 3, 1), (5, 6, 7)),
]


def in_tiles(place: int, other: int, length: int, size: int, tile: int) -> bool:
    """Whether `other` is in the `size` tiles around that of `place`, moved inwards, along a side of that length."""
    first = max(0, min((place // tile - size // 2) * tile, length - size * tile))
    return first <= other < first + size * tile


def sees(window: Window, query: tuple[int, int, int], key: tuple[int, int, int], sides: tuple[int, int, int]) -> bool:
    """By the definition, for one query and key at (frame, row, column)."""
    if window.frames and not in_tiles(query[0], key[0], sides[0], window.frames, window.tile_frames):
        return False
    if window.shape == "circle":
        return (query[1] - key[1]) ** 2 + (query[2] - key[2]) ** 2 < window.size**2
    return all(in_tiles(query[i], key[i], sides[i], window.size, window.tile) for i in (1, 2))


def keep(window: Window, grid: Grid) -> Tensor:
    """Which keys [N] each query [N] sees: bool [N, N]."""
    places = [(frame, row, column) for frame in range(grid.frames) for row in range(grid.height)
              for column in range(grid.width)]  # fmt: skip
    image = torch.tensor([[sees(window, query, key, grid.sides) for key in places] for query in places])
    start = grid.text if grid.text_first else 0
    found = torch.ones(grid.text + grid.image, grid.text + grid.image, dtype=torch.bool)
    found[start : start + grid.image, start : start + grid.image] = image
    return found


def softmax(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = (query.double() @ key.double().transpose(-1, -2)) * scale
    return torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ value.double()


def tensors(grid: Grid, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, grid.text + grid.image, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_attention_in_blocks_is_softmax_over_the_window_and_the_text(window: Window, sides: tuple[int, int]) -> None:
    for text, text_first in ((5, True), (3, False), (0, True)):
        grid = Grid(text, *sides, text_first)
        query, key, value = tensors(grid)
        found = local_attention(query, key, value, grid, window, 0.25)
        # float32 sums of at most 85 products of 16 channels: a few units of 2^-24 of values of order 1.
        assert (found - softmax(query, key, value, keep(window, grid), 0.25)).abs().max() < 5e-6


@pytest.mark.parametrize(("window", "sides"), VIDEOS, ids=str)
def test_windows_over_videos_are_softmax_over_tiles_of_frames_rows_and_columns(
    window: Window, sides: tuple[int, int, int]
) -> None:
    grid = Grid(3, *sides[1:], frames=sides[0])
    query, key, value = (tensor.double() for tensor in tensors(grid))
    found, seen = local_attention(query, key, value, grid, window, 0.25), keep(window, grid)
    assert (found - softmax(query, key, value, seen, 0.25)).abs().max() < 1e-13
    most = seen[grid.text :, grid.text :].sum(1)
    if window.shape == "tiles":
        assert set(most.tolist()) == {window.keys_a_query(*sides)}  # which is what costs are counted by
    assert not window.covers(*sides) and most.max() <= window.keys_a_query(*sides) < grid.image


def test_a_window_over_all_of_a_video_is_attention_to_all() -> None:
    grid = Grid(0, 7, 5, frames=5)
    query, key, value = (tensor.double() for tensor in tensors(grid))
    for window in (Window("tiles", 4, 2, 3, 2), Window("tiles", 3, 3, 0, 3), Window("circle", 8, 4, 5)):
        assert window.covers(*grid.sides)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.25)
        assert (local_attention(query, key, value, grid, window, 0.25) - expected).abs().max() < 1e-13
    # One frame, row or column less, and something is hidden.
    assert not Window("tiles", 4, 2, 2, 2).covers(5, 7, 5) and not Window("circle", 8, 4, 4).covers(5, 7, 5)


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_pooled_keys_are_seen_beside_the_window_and_count_as_one_key_each(sides: tuple[int, int]) -> None:
    grid, window, patch = Grid(4, *sides), Window("circle", 2, 4), 2
    query, key, value = tensors(grid)
    weights = torch.rand(3, patch**2, generator=torch.Generator().manual_seed(1)) + 0.1
    pooling = Pooling(patch, weights, 3 * weights)  # only their shares count

    def small(tokens: Tensor) -> Tensor:
        rows, columns = (-(-side // patch) for side in sides)
        pooled = torch.zeros(2, 3, rows * columns, 16, dtype=torch.float64)
        image = tokens[:, :, grid.text :].unflatten(2, sides).double()
        for head in range(3):
            for place in range(rows * columns):
                for number in range(patch**2):
                    row = min(place // columns * patch + number // patch, sides[0] - 1)
                    column = min(place % columns * patch + number % patch, sides[1] - 1)
                    share = weights[head, number].double() / weights[head].double().sum()
                    pooled[:, head, place] += share * image[:, head, row, column]
        return pooled

    keys, values = (torch.cat([tokens.double(), small(tokens)], 2) for tokens in (key, value))
    of_image = torch.cat([keep(window, grid)[grid.text :], torch.ones(grid.image, small(key).shape[2]).bool()], 1)
    expected = softmax(query[:, :, grid.text :], keys, values, of_image, 0.25)
    found = local_attention(query, key, value, grid, window, 0.25, pooling)
    assert (found[:, :, grid.text :] - expected).abs().max() < 5e-6
    # Text sees the picture as it is.
    all_seen = torch.ones(grid.text, grid.text + grid.image, dtype=torch.bool)
    assert (found[:, :, : grid.text] - softmax(query[:, :, : grid.text], key, value, all_seen, 0.25)).abs().max() < 5e-6


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_work_grows_with_the_picture_and_not_with_its_square(window: Window) -> None:
    small, large = (blocks(window, side, side) for side in (24, 48))
    assert large.queries.size == 4 * small.queries.size and large.keys.size == 4 * small.keys.size
    assert large.keys.shape[1] == window.keys_a_query(48, 48) == window.sides[1].extent ** 2


def test_scores_are_sharpened_only_above_the_usual_number_of_tokens() -> None:
    assert temperature(64, 64) == temperature(10, 64) == 1.0
    assert temperature(64**2, 64) == pytest.approx(math.sqrt(2))


def test_a_window_that_covers_the_picture_says_so() -> None:
    assert Window("tiles", 3, 4).covers(12, 9) and not Window("tiles", 3, 4).covers(13, 9)
    # The far corner of 4 x 4 tokens is sqrt(18) away, and a circle's edge is not in it.
    assert Window("circle", 5, 4).covers(4, 4) and not Window("circle", 4, 4).covers(4, 4)


@pytest.mark.parametrize("sides", [(4, 5), (4, 4), (3, 4), (1, 1)], ids=str)
def test_a_circle_covers_what_no_pair_of_tokens_is_outside_of(sides: tuple[int, int]) -> None:
    window = Window("circle", 5, 2)  # corners of 4 x 5 lie exactly 5 apart, and so outside
    assert window.covers(*sides) == bool(keep(window, Grid(0, *sides)).all())
