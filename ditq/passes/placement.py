"""Which of several parts each attention gets, or none, so that all together stay within a share of the multiply-adds.

Each part was measured alone. The choice is the multiple-choice knapsack of least error in sum (ditq/numerics/knapsack.py),
solved exactly; but errors add up only roughly, so what was chosen is measured as a whole too, and so are some of the front.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditq.errors import DitqError
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.knapsack import smallest, solve
from ditq.passes.base import PassReport

LEFT = "softmax"
POINTS = 9  # of the front
JOINT = 3  # of them, measured as a whole
GAP = 1e-3  # a share of the error; what is chosen is solved on its own, to much less
KEPT = "multiply-adds of attention, of those before"


@dataclass(frozen=True, eq=False)
class Offer:
    """What an attention may become: multiply-adds, relative squared error of the denoiser's answers with it alone, the part;
    None where the attention stays.
    """

    name: str
    macs: int
    error: float
    part: TokenAttention | None = None


@dataclass
class PlacementReport(PassReport):
    """With the front that the choice is a point of, and what a reader should know of it, a line each."""

    front: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "front": self.front, "notes": self.notes}


def placed(
    who: str,
    offers: Sequence[Sequence[Offer]],
    before: int,
    share: float,
    measure: Callable[[Sequence[Offer]], float],
) -> tuple[list[Offer], list[dict[str, Any]]]:
    """The offers of least error that need at most `share` of the multiply-adds `before`, one an attention; the front's rows.

    measure: the denoiser's error with all these offers together.

    Raises:
        DitqError: even the cheapest need more.
    """
    width = max(len(some) for some in offers)
    filled = [[*some, *[some[0]] * (width - len(some))] for some in offers]  # the same again costs as much
    errors = np.array([[offer.error for offer in some] for some in filled])
    sizes = np.array([[offer.macs for offer in some] for some in filled], dtype=np.int64)
    least, limit = smallest(sizes), int(share * before)
    if least > limit:
        raise DitqError(
            f"pass {who!r}: all attentions together need at least {least / before:.3f} of the multiply-adds of softmax with "
            f"what it offers, more than {share:g}; ask for more, or give smaller windows or tiles"
        )

    def taken(most: int, gap: float | None = None) -> list[Offer]:
        choice = solve(errors, sizes, most) if gap is None else solve(errors, sizes, most, gap)
        return [some[index] for some, index in zip(filled, choice, strict=True)]

    chosen = taken(limit)
    points = [chosen, *(taken(int(most), GAP) for most in np.linspace(least, before, POINTS))]
    by_macs = {sum(offer.macs for offer in point): point for point in reversed(points)}  # the chosen one stays
    whole = sorted(by_macs)
    # What needs more and is not predicted to lose less is no point of the front.
    kept = [macs for place, macs in enumerate(whole) if macs == _macs(chosen) or _best(by_macs, whole[:place], macs)]
    wanted = {kept[int(index)] for index in np.linspace(0, len(kept) - 1, JOINT).round()} | {_macs(chosen)}
    rows = []
    for macs in kept:
        point = by_macs[macs]
        predicted = sum(offer.error for offer in point)
        measured = measure(point) if macs in wanted and predicted > 0 else None
        counts = Counter(offer.name for offer in point)
        rows.append(
            {
                KEPT: macs / before,
                "predicted error, dB": _decibels(predicted),
                "measured error, dB": None if measured is None else _decibels(measured),
                "chosen": macs == _macs(chosen),
                "attentions": ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
            }
        )
    return chosen, rows


def _macs(offers: Sequence[Offer]) -> int:
    return sum(offer.macs for offer in offers)


def _best(points: dict[int, list[Offer]], smaller: Sequence[int], macs: int) -> bool:
    """Whether a point is predicted to lose less than all that need less."""
    lost = {size: sum(offer.error for offer in points[size]) for size in (*smaller, macs)}
    return all(lost[macs] < lost[size] for size in smaller)


def _decibels(error: float) -> float | None:
    """None for no error at all, which has no logarithm and no JSON."""
    return None if error <= 0 else float(10 * np.log10(error))
