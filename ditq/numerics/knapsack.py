"""The multiple-choice knapsack: one candidate for each linear, sizes within a limit, errors least in sum. Exact.

    minimize  sum_ij e_ij x_ij    with    sum_j x_ij = 1,   sum_ij b_ij x_ij <= B,   x_ij in {0, 1}

Solved as a mixed-integer program by HiGHS, which proves that no other assignment is better; where its time is over before,
the best one that is known is taken, and that is said.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, kron

from ditq.quiet import quiet_compiled_code

GAP = 1e-6  # relative distance from the optimum at which a solution counts as proven
SECONDS = 60.0


def smallest(sizes: NDArray[np.int64]) -> int:
    """The least size that any assignment has; sizes [N, F]."""
    return int(sizes.min(axis=1).sum())


def solve(errors: NDArray[np.float64], sizes: NDArray[np.int64], limit: int, gap: float = GAP) -> NDArray[np.int64]:
    """The choice [N] of least error within `limit`, to a share of `gap`; errors and sizes are [N, F].

    Warns where the solver's time was over before that was proven.

    Raises:
        ValueError: no assignment is small enough, or shapes differ.
    """
    choice, unproven = best_known(errors, sizes, limit, gap)
    if unproven:
        warnings.warn(f"an assignment is not proven to be the best: {unproven}", stacklevel=2)
    return choice


def best_known(
    errors: NDArray[np.float64], sizes: NDArray[np.int64], limit: int, gap: float = GAP
) -> tuple[NDArray[np.int64], str]:
    """(the choice as `solve` gives it; why it is not proven to be of least error, or nothing where it is).

    Errors span many orders of magnitude, and a solver's tolerances are absolute. So they are measured in units of what
    the best assignment found so far loses, once more when that turns out to be much less than the first guess.

    Raises:
        ValueError: as `solve`.
    """
    if errors.shape != sizes.shape or errors.ndim != 2:
        raise ValueError(f"errors {errors.shape} and sizes {sizes.shape} are not of the same linears and candidates")
    if smallest(sizes) > limit:
        raise ValueError(f"the smallest assignment takes {smallest(sizes)}, more than {limit}")
    if int(sizes[np.arange(len(sizes)), errors.argmin(axis=1)].sum()) <= limit:
        return errors.argmin(axis=1).astype(np.int64), ""
    choice, unproven = _greedy(errors, sizes, limit), ""
    for _ in range(2):
        found, unproven = _milp(errors, sizes, limit, _total(errors, choice) or 1.0, gap)
        if found is None:
            break
        if _total(sizes, found) <= limit and _total(errors, found) < _total(errors, choice):
            choice = found
    return choice, unproven


def _milp(
    errors: NDArray[np.float64], sizes: NDArray[np.int64], limit: int, unit: float, gap: float
) -> tuple[NDArray[np.int64] | None, str]:
    """(the solver's choice, or None where it has none; why it has not proven it, or nothing)."""
    count, width = errors.shape
    one_each = csr_array(kron(csr_array(np.eye(count)), np.ones((1, width))))
    total = csr_array((sizes / limit).reshape(1, -1))
    with quiet_compiled_code():  # HiGHS prints a line where it solves a part anew, though told to be silent
        result = milp(
            np.minimum(
                errors / unit, 1e6
            ).ravel(),  # what is a million times worse than a known choice is not taken anyway
            integrality=np.ones(errors.size),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(total, -np.inf, 1)],
            options={"mip_rel_gap": gap, "time_limit": SECONDS},
        )
    unproven = "" if result.status == 0 else str(result.message)
    return None if result.x is None else result.x.reshape(errors.shape).argmax(axis=1), unproven


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
