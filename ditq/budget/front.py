"""Assignments of least predicted error over all sizes: the Pareto front, in a number of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditq.budget.choices import Choices
from ditq.numerics.knapsack import smallest, solve
from ditq.report.metrics import decibels

POINTS = 25
GAP = 1e-3  # a share of the error; the one that a budget of size takes is solved on its own, to much less


@dataclass(frozen=True, eq=False)
class Point:
    """One assignment: choice [N], what it takes, the relative squared error (cost.py) as predicted and as measured, and
    the mean PSNR of pictures in dB where they were drawn.
    """

    choice: NDArray[np.int64]
    bytes: int
    bits: float
    predicted: float
    measured: float | None = None
    psnr: float | None = None
    chosen: bool = False

    def row(self, choices: Choices) -> dict[str, Any]:
        """A row of the report's table."""
        labels = list(choices.labels(self.choice).values())
        counts = {name: labels.count(name) for name in choices.names} | {"as the recipe has it": len(choices.held)}
        return {
            "weights, bytes": self.bytes,
            "bits a weight": self.bits,
            "predicted error, dB": _level(self.predicted),
            "measured error, dB": _level(self.measured),
            "PSNR, dB": self.psnr,
            "chosen": self.chosen,
            "linears": ", ".join(f"{count} {name}" for name, count in counts.items() if count),
        }


def point(choices: Choices, errors: NDArray[np.float64], choice: NDArray[np.int64]) -> Point:
    """What an assignment takes and is predicted to lose."""
    choice = choices.by_first_names(choice)
    predicted = float(errors[np.arange(len(choice)), choice].sum())
    return Point(choice, choices.size(choice), choices.bits_a_weight(choice), predicted)


def front(choices: Choices, errors: NDArray[np.float64], count: int = POINTS) -> list[Point]:
    """Assignments of least error at `count` limits of size, evenly from the smallest to the largest, without repetitions."""
    least = smallest(choices.bytes)
    best = errors.argmin(axis=1)
    most = int(choices.bytes[np.arange(len(best)), best].sum())
    points: list[Point] = []
    for limit in np.linspace(least, max(least, most), count):
        found = point(choices, errors, solve(errors, choices.bytes, int(limit), GAP))
        if not points or (found.bytes > points[-1].bytes and found.predicted < points[-1].predicted):
            points.append(found)
    return points


def _level(error: float | None) -> float | None:
    """In dB; None for no error at all, which has no logarithm and no JSON."""
    return -decibels(error) if error else None


def agreement(predicted: Sequence[float], found: Sequence[float]) -> tuple[float | None, float | None]:
    """(correlation of the logarithms, mean ratio found / predicted in dB) of errors above 0; None where too few can tell."""
    if not predicted:
        return None, None
    a, b = np.log10(predicted), np.log10(found)
    correlation = float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None
    return correlation, float(10 * (b - a).mean())
