"""The Lloyd-Max codebook: its iteration ends where both of Lloyd's conditions hold, near the best levels there are."""

from __future__ import annotations

import pytest
import torch

from ditq.numerics.carrier import INT8
from ditq.numerics.codebook import CODEBOOKS, encode
from ditq.numerics.codebooks.lloyd_max import Histogram, lloyd
from tests.numerics.weights import gaussian, heavy_tailed, nearest_error, relative_error, skewed

# Distortion of the optimal quantizer of a normal distribution (Max 1960, table I)
MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("bits", MAX)
def test_normal_weights_have_the_error_of_maxs_quantizer(bits: int) -> None:
    # a scale of each row's own adapts to its values: 2^b + 1 parameters a row cannot gain more than their share
    weight = gaussian()
    found = relative_error(weight, CODEBOOKS["lloyd_max"](weight, bits))
    assert (1 - 2 * 2**bits / weight.shape[1] - 0.01) * MAX[bits] < found < 1.01 * MAX[bits]


@pytest.mark.parametrize("weights", [gaussian(64, 1024), heavy_tailed(64, 1024), skewed(64, 1024)])
def test_the_iteration_ends_where_each_level_is_the_mean_of_its_values(weights: torch.Tensor) -> None:
    values = 20 * weights / weights.square().mean(1, keepdim=True).sqrt()
    importance = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    levels = lloyd(Histogram.of(values, importance), torch.linspace(-50, 50, 8).double())
    nearest = (values.double().flatten()[:, None] - levels).abs().argmin(1)
    for code, level in enumerate(levels):
        mine = importance.flatten()[nearest == code].double()
        mean = (mine * values.flatten()[nearest == code]).sum() / mine.sum()
        # values are assigned by sixteenths of a step; a tenth is well below what rounding to the grid moves
        assert float(level) == pytest.approx(float(mean), abs=0.1)


def best_levels_error(values: torch.Tensor, count: int) -> float:
    """The least squared error that `count` levels can have on the values [N], by dynamic programming over sorted cells."""
    ordered = values.double().sort().values
    zero = ordered.new_zeros(1)
    sums, squares = torch.cat((zero, ordered.cumsum(0))), torch.cat((zero, ordered.square().cumsum(0)))
    n = len(ordered) + 1
    size = torch.arange(n)[None, :] - torch.arange(n)[:, None]  # of the cell from i to j
    cell = squares[None, :] - squares[:, None] - (sums[None, :] - sums[:, None]).square() / size.clamp_min(1)
    cell = torch.where(size >= 0, cell, torch.inf)
    least = cell[0]
    for _ in range(count - 1):
        least = (least[:, None] + cell).amin(0)
    return float(least[-1])


def test_normal_values_get_levels_next_to_the_best_there_are() -> None:
    values = 20 * gaussian(1, 1500) / 0.02
    levels = lloyd(Histogram.of(values, torch.ones_like(values)), torch.linspace(-40, 40, 8).double())
    # a normal density has one fixed point; 1500 samples of it have others beside it, up to two percent off
    assert float(nearest_error(values[0], levels)) < 1.05 * best_levels_error(values[0], 8)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("weights", [gaussian(64), heavy_tailed(), skewed()], ids=["normal", "heavy", "skewed"])
def test_it_is_no_worse_than_the_tables_that_it_starts_from(weights: torch.Tensor, bits: int) -> None:
    fit = CODEBOOKS["lloyd_max"](weights, bits)
    assert bool((fit.table.int().diff() > 0).all()) and int(fit.table.int().abs().max()) <= INT8.largest(bits)
    for name in ("nf", "twin_log_shared"):
        other = CODEBOOKS[name](weights, bits)
        energy = weights.double().square()
        rows = [(weights - encode(weights, f).decode()).double().square().sum() / energy.sum() for f in (fit, other)]
        assert rows[0] <= rows[1] * (1 + 1e-6)


def test_levels_follow_weights_that_lie_more_on_one_side() -> None:
    weights = skewed()
    fit = CODEBOOKS["lloyd_max"](weights, 3)
    assert relative_error(weights, fit) < 0.8 * relative_error(weights, CODEBOOKS["twin_log_shared"](weights, 3))
    assert int((fit.table > 0).sum()) > int((fit.table < 0).sum())


def test_large_and_small_rows_count_by_their_size() -> None:
    """The levels suit the rows that make the error: here uniform ones, a hundred times larger than the normal ones."""
    g = torch.Generator().manual_seed(0)
    large, small = torch.rand(32, 512, generator=g) * 2 - 1, 0.01 * torch.randn(32, 512, generator=g)
    both = CODEBOOKS["lloyd_max"](torch.cat((large, small)), 4).table.int()
    alone = CODEBOOKS["lloyd_max"](large, 4).table.int()
    assert int((both - alone).abs().max()) <= 1
