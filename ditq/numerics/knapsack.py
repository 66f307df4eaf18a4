"""The multiple-choice knapsack: one candidate for each linear, sizes within a limit, errors least in sum. Exact.

    minimize  sum_ij e_ij x_ij    with    sum_j x_ij = 1,   sum_ij b_ij x_ij <= B,   x_ij in {0, 1}

Solved as a mixed-integer program by HiGHS, which proves that no other assignment is better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, kron

GAP = 1e-6  # relative distance from the optimum at which a solution counts as proven
SECONDS = 60.0


def smallest(sizes: NDArray[np.int64]) -> int:
    """The least size that any assignment has; sizes [N, F]."""
    return int(sizes.min(axis=1).sum())


def solve(errors: NDArray[np.float64], sizes: NDArray[np.int64], limit: int, gap: float = GAP) -> NDArray[np.int64]:
    """The choice [N] of least error within `limit`, to a share of `gap`; errors and sizes are [N, F].

    Errors span many orders of magnitude, and a solver's tolerances are absolute. So they are measured in units of what
    the best assignment found so far loses, once more when that turns out to be much less than the first guess.

    Raises:
        ValueError: no assignment is small enough, or shapes differ.
    """
    if errors.shape != sizes.shape or errors.ndim != 2:
        raise ValueError(f"errors {errors.shape} and sizes {sizes.shape} are not of the same linears and candidates")
    if smallest(sizes) > limit:
        raise ValueError(f"the smallest assignment takes {smallest(sizes)}, more than {limit}")
    if int(sizes[np.arange(len(sizes)), errors.argmin(axis=1)].sum()) <= limit:
        return errors.argmin(axis=1).astype(np.int64)
    choice = _greedy(errors, sizes, limit)
    for _ in range(2):
        found = _milp(errors, sizes, limit, _total(errors, choice) or 1.0, gap)
        if _total(sizes, found) <= limit and _total(errors, found) < _total(errors, choice):
            choice = found
    return choice


def _milp(
    errors: NDArray[np.float64], sizes: NDArray[np.int64], limit: int, unit: float, gap: float
) -> NDArray[np.int64]:
    count, width = errors.shape
    one_each = csr_array(kron(csr_array(np.eye(count)), np.ones((1, width))))
    total = csr_array((sizes / limit).reshape(1, -1))
    result = milp(
        np.minimum(errors / unit, 1e6).ravel(),  # what is a million times worse than a known choice is not taken anyway
        integrality=np.ones(errors.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(total, -np.inf, 1)],
        options={"mip_rel_gap": gap, "time_limit": SECONDS},
    )
    if result.x is None:
        raise ValueError(f"the solver found no assignment: {result.message}")
    found: NDArray[np.int64] = result.x.reshape(errors.shape).argmax(axis=1)
    return found


def _greedy(errors: NDArray[np.float64], sizes: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """A good assignment: from the smallest on, always the change that spares most error for its size and still fits."""
    rows = np.arange(len(sizes))
    choice = sizes.argmin(axis=1).astype(np.int64)
    while True:
        spared = errors[rows, choice][:, None] - errors
        added = sizes - sizes[rows, choice][:, None]
        fits = (spared > 0) & (added <= limit - _total(sizes, choice))
        if not fits.any():
            return choice
        worth = np.where(fits, spared / np.maximum(added, 1e-3), -np.inf)
        row, candidate = np.unravel_index(int(worth.argmax()), worth.shape)
        choice[row] = candidate


def _total(values: NDArray[np.float64] | NDArray[np.int64], choice: NDArray[np.int64]) -> float:
    return float(values[np.arange(len(values)), choice].sum())
