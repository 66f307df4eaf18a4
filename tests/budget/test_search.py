"""The search for a quality finds the smallest good assignment in few measurements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ditq.budget.search import smallest_good

ERRORS = list(np.linspace(-5.0, -45.0, 33))  # dB, falling
CURVES: dict[str, Callable[[float], float]] = {
    "a dB for a dB": lambda error: 15 - error,
    "flat": lambda error: 20 - 0.3 * error,
    "saturating": lambda error: 40 - 30 * 10 ** (error / 20),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("where", [0, 3, 17, 31, 32])
def test_the_smallest_assignment_that_is_good_enough_is_found(curve: str, where: int) -> None:
    quality = CURVES[curve]
    target = quality(ERRORS[where]) - 1e-9
    found, measured = smallest_good(ERRORS, lambda place: quality(ERRORS[place]), target, most=12)
    assert found == where
    assert all(measured[place] == quality(ERRORS[place]) for place in measured)


def test_the_number_of_measurements_is_bounded_and_what_is_returned_was_measured_good() -> None:
    calls: list[int] = []

    def measure(place: int) -> float:
        calls.append(place)
        return 20.0 + place * 0.4

    found, measured = smallest_good(ERRORS, measure, 27.3, most=4)
    assert len(calls) <= 5 and found is not None and measured[found] >= 27.3


def test_a_quality_beyond_the_largest_assignment_is_told_apart() -> None:
    found, measured = smallest_good(ERRORS, float, 1000.0)
    assert found is None and measured[len(ERRORS) - 1] == len(ERRORS) - 1.0
