"""Dividing hidden channels among experts."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ditq.numerics.experts import (
    balance_offset,
    balanced_assignment,
    cluster_channels,
    contributions,
    covariance_of,
    needed_importance,
    ridge,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("things", "groups"), [(6, 2), (24, 4), (60, 12), (96, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_is_balanced_and_the_cheapest(things, groups, seed):
    cost = torch.rand(things, groups, dtype=torch.float64, generator=generator(seed)) ** 3
    cost[:, 0] /= 4  # most would like to go to one group
    given = balanced_assignment(cost)
    assert torch.bincount(given, minlength=groups).tolist() == [things // groups] * groups
    seats = cost.repeat_interleave(things // groups, dim=1)  # an independent solver: each seat of a group is a column
    rows, columns = linear_sum_assignment(seats.numpy())
    best = float(seats[rows, columns].sum())
    assert float(cost[torch.arange(things), given].sum()) == pytest.approx(best, rel=1e-9)


def test_things_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 things"):
        balanced_assignment(torch.rand(5, 2))


def test_channels_that_are_active_together_form_a_group():
    kinds = torch.randint(0, 4, (400,), generator=generator(1))
    belongs = torch.arange(4).repeat(6)[torch.randperm(24, generator=generator(2))]
    a = (kinds[:, None] == belongs).double() + 0.1 * torch.randn(400, 24, dtype=torch.float64, generator=generator(3))
    given = cluster_channels(a, 4)
    assert all(len(set(given[belongs == kind].tolist())) == 1 for kind in range(4))


def test_the_channels_needed_least_go_first():
    """Against all choices of channels, each with the best weights for what is kept."""
    torch.manual_seed(0)
    a = torch.randn(300, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    weight = torch.randn(3, 6, dtype=torch.float64)
    covariance = covariance_of(a, torch.ones(300))

    def lost(kept: tuple[int, ...]) -> float:
        index = list(kept)
        fitted = torch.linalg.solve(covariance[index][:, index], covariance[index] @ weight.T).T
        change = torch.zeros_like(weight)
        change[:, index] = fitted
        change -= weight
        return float((change @ covariance @ change.T).trace())

    chosen = tuple(sorted(needed_importance(covariance, weight, 5).topk(5).indices.tolist()))
    losses = {kept: lost(kept) for kept in itertools.combinations(range(6), 5)}
    assert losses[chosen] == pytest.approx(min(losses.values()), rel=1e-2)  # one channel: the greedy choice is the best
    chosen = tuple(sorted(needed_importance(covariance, weight, 3).topk(3).indices.tolist()))
    losses = {kept: lost(kept) for kept in itertools.combinations(range(6), 3)}
    assert losses[chosen] <= sorted(losses.values())[3]


def test_ridge_is_weighted_least_squares_around_a_start():
    torch.manual_seed(1)
    x, w = torch.randn(50, 4, dtype=torch.float64), torch.rand(50, dtype=torch.float64) + 0.1
    y = x @ torch.randn(4, 3, dtype=torch.float64) + 2 + 0.1 * torch.randn(50, 3, dtype=torch.float64)
    weight, bias = ridge(x, y, w, damping=0.0)
    extended, root = torch.cat((x, torch.ones(50, 1, dtype=torch.float64)), 1), w.sqrt()[:, None]
    expected = torch.linalg.lstsq(extended * root, y * root).solution.T
    assert torch.allclose(torch.cat((weight, bias[:, None]), 1), expected, atol=1e-9)
    start = torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(ridge(x, y, w, start, damping=1e9)[0], start, atol=1e-6)


def test_what_an_expert_contributes_is_measured_from_its_mean():
    a = torch.tensor([[1.0, 2.0, 5.0], [3.0, 2.0, 5.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0]])
    found = contributions(a, a.mean(dim=0), weight, torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_no_expert_is_overrun_after_balancing():
    torch.manual_seed(2)
    scores = torch.randn(4000, 8) + torch.linspace(-2, 2, 8)
    chosen = (scores + balance_offset(scores, 2, 1.25)).topk(2, dim=1).indices
    load = torch.bincount(chosen.flatten(), minlength=8) / 1000
    assert float(load.max()) <= 1.25 and float(load.min()) >= 0.4
