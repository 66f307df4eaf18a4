"""Linear attention is what its formula says, written as a sum over all pairs of tokens in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.linear_attention import FEATURES, LinearForm, linear_attention
from ditq.numerics.local_attention import local_attention
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Window
from tests.numerics.test_local_attention import keep, softmax, tensors

HEADS, WIDTH, SCALE = 3, 16, 0.25
GRIDS = [Grid(5, 6, 7), Grid(3, 4, 4, text_first=False), Grid(0, 5, 5)]


def weights_of_pairs(query: Tensor, key: Tensor, kind: str) -> Tensor:
    """phi(q) phi(k)^T of mapped queries and keys: float64 [B, h, N, M]."""
    if kind == "relu":
        return query.clamp_min(0) @ key.clamp_min(0).transpose(-1, -2)
    if kind == "elu":
        one, two = (torch.where(x > 0, x + 1, x.exp()) for x in (query, key))
        return one @ two.transpose(-1, -2)
    pairs = [(query, key), (-query, -key)]
    return torch.stack([F.softmax(q, -1) @ F.softmax(k, -1).transpose(-1, -2) for q, k in pairs]).sum(0)


def maps(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(WIDTH) + 0.2 * torch.randn(HEADS, WIDTH, WIDTH, generator=generator)


def image(tensor: Tensor, grid: Grid) -> Tensor:
    return grid.parted(tensor)[0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("window", [None, Window("circle", 2, 2), Window("tiles", 1, 3)], ids=str)
def test_softmax_and_features_share_one_normaliser(kind: str, window: Window | None, grid: Grid) -> None:
    query, key, value = tensors(grid)
    query_map, key_map, gain = maps(1), maps(2), torch.tensor([-1.0, 0.0, 0.7])
    joined = grid.text > 0 or window is not None
    form = LinearForm(kind, query_map, key_map, window, gain if joined else None)
    found = linear_attention(query, key, value, grid, SCALE, form)

    wide = [tensor.double() for tensor in (query, key, value)]
    mapped = [image(x, grid) @ weight.double() for x, weight in zip(wide, (query_map, key_map), strict=False)]
    pairs = weights_of_pairs(mapped[0], mapped[1], kind)
    total, values = pairs.sum(-1, keepdim=True), pairs @ image(wide[2], grid)
    if joined:
        scores = SCALE * image(wide[0], grid) @ wide[1].transpose(-1, -2)
        seen = keep(window or Window("circle", 1, 1), grid)
        start = grid.text if grid.text_first else 0
        seen = seen[start : start + grid.image]
        if window is None:
            seen[:, start : start + grid.image] = False
        scores = scores.masked_fill(~seen, -torch.inf)
        exact = (scores - scores.amax(-1, keepdim=True)).exp()
        factor = gain.double().exp()[:, None, None]
        total, values = exact.sum(-1, keepdim=True) + factor * total, exact @ wide[2] + factor * values
    # Sums of up to 47 products in float32.
    assert (image(found, grid) - values / total).abs().max() < 1e-5
    if grid.text:
        text = grid.parted(found)[1]
        all_seen = torch.ones(grid.text, grid.text + grid.image, dtype=torch.bool)
        assert (text - softmax(grid.parted(query)[1], key, value, all_seen, SCALE)).abs().max() < 5e-6


def test_the_added_form_starts_as_attention_to_the_window_and_then_adds_what_is_projected() -> None:
    grid, window = GRIDS[0], Window("tiles", 1, 3)
    query, key, value = tensors(grid)
    zeros = torch.zeros(HEADS, WIDTH, WIDTH)
    sparse = local_attention(query, key, value, grid, window, SCALE)
    form = LinearForm("softmax", maps(1), maps(2), window, projection=zeros)
    assert torch.equal(linear_attention(query, key, value, grid, SCALE, form), sparse)
    alone = linear_attention(*(image(x, grid) for x in (query, key, value)), grid.without_text(), SCALE,
                             LinearForm("softmax", maps(1), maps(2)))  # fmt: skip
    form = LinearForm("softmax", maps(1), maps(2), window, projection=maps(3))
    found = image(linear_attention(query, key, value, grid, SCALE, form), grid)
    assert (found - image(sparse, grid) - alone @ maps(3)).abs().max() < 1e-5


def test_locality_is_a_convolution_of_each_channel_over_the_picture() -> None:
    grid = Grid(2, 4, 5)
    query, key, value = tensors(grid)
    kernels = torch.randn(HEADS * WIDTH, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    plain, local = (
        linear_attention(
            query, key, value, grid, SCALE, LinearForm("relu", maps(1), maps(2), None, torch.zeros(3), None, k)
        )
        for k in (None, kernels)
    )
    picture = image(value, grid).unflatten(2, (4, 5)).double()
    expected = torch.zeros_like(picture)
    for row, column, down, right in itertools.product(range(4), range(5), range(3), range(3)):
        y, x = row + down - 1, column + right - 1
        if 0 <= y < 4 and 0 <= x < 5:
            expected[:, :, row, column] += picture[:, :, y, x] * kernels[:, 0, down, right].view(HEADS, WIDTH).double()
    assert (image(local - plain, grid) - expected.flatten(2, 3)).abs().max() < 1e-5


def test_half_precision_sums_do_not_overflow() -> None:
    grid = Grid(0, 32, 32)
    query, key, value = (30 * tensor.half() for tensor in tensors(grid))
    form = LinearForm("relu", torch.eye(WIDTH).expand(HEADS, -1, -1), torch.eye(WIDTH).expand(HEADS, -1, -1))
    found = linear_attention(query, key, value, grid, SCALE, form)
    assert found.dtype == torch.float16 and bool(found.isfinite().all())
    exact = linear_attention(query.double(), key.double(), value.double(), grid, SCALE,
                             LinearForm("relu", form.query_map.double(), form.key_map.double()))  # fmt: skip
    assert (found - exact).abs().max() <= 2**-11 * exact.abs().max()  # the rounding of the result alone
