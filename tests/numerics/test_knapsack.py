"""The knapsack gives the assignment that trying all of them gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ditq.numerics import knapsack
from ditq.numerics.knapsack import GAP, best_known, smallest, solve

BITS = np.array([3, 4, 5, 6, 8])


def _best_of_all(errors: np.ndarray, sizes: np.ndarray, limit: int) -> float:
    rows = np.arange(len(errors))
    totals = [
        errors[rows, list(choice)].sum()
        for choice in itertools.product(range(errors.shape[1]), repeat=len(errors))
        if sizes[rows, list(choice)].sum() <= limit
    ]
    return float(min(totals))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_assignment_within_the_limit_loses_less(seed: int) -> None:
    generator = np.random.default_rng(seed)
    widths = generator.integers(50, 5000, size=6)
    sizes = widths[:, None] * BITS + generator.integers(0, 40, size=(6, 5))
    strength = 10.0 ** generator.uniform(-7, -1, size=6)  # six orders of magnitude between linears, as in real models
    errors = strength[:, None] * 4.0 ** -(BITS - 3.0) * generator.uniform(0.7, 1.4, size=(6, 5))
    least, most = smallest(sizes), int(sizes.max(axis=1).sum())
    for share in (0.0, 0.1, 0.35, 0.6, 0.85, 1.0):
        limit = int(least + share * (most - least))
        choice = solve(errors, sizes, limit)
        rows = np.arange(6)
        assert sizes[rows, choice].sum() <= limit
        assert errors[rows, choice].sum() <= _best_of_all(errors, sizes, limit) * (1 + 2 * GAP)


def test_a_limit_below_the_smallest_assignment_is_refused() -> None:
    sizes = np.array([[3, 4], [30, 40]])
    with pytest.raises(ValueError, match="smallest assignment takes 33"):
        solve(np.ones((2, 2)), sizes, 32)


def test_where_all_fits_each_linear_gets_its_best() -> None:
    errors = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])  # more bits are not always better
    assert solve(errors, np.array([[1, 2, 3], [1, 2, 3]]), 6).tolist() == [1, 0]


def test_where_the_solver_has_no_time_the_best_known_assignment_is_taken_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    errors = -np.sort(-generator.random((300, 6)), axis=1)
    sizes = np.sort(generator.integers(1, 10**6, (300, 6)), axis=1)
    limit = smallest(sizes) + int(sizes.sum()) // 12
    monkeypatch.setattr(knapsack, "SECONDS", 1e-3)
    with pytest.warns(UserWarning, match="not proven to be the best: .*[Tt]ime limit"):
        choice = solve(errors, sizes, limit)
    rows = np.arange(300)
    assert sizes[rows, choice].sum() <= limit and errors[rows, choice].sum() < 0.75 * errors[:, 0].sum()
    assert best_known(errors, sizes, limit)[1]
    monkeypatch.setattr(knapsack, "SECONDS", 60.0)
    proven, unproven = best_known(errors, sizes, limit, 1e-2)
    assert not unproven and errors[rows, proven].sum() < 1.01 * errors[rows, choice].sum()
