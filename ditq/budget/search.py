"""The smallest assignment of the front whose pictures are good enough, from few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

SLOPE = 0.8  # dB of PSNR a dB of predicted error, until two measurements tell
SLOPES = (0.2, 2.0)


def smallest_good(
    errors_db: Sequence[float], measure: Callable[[int], float], target: float, most: int = 7
) -> tuple[int | None, dict[int, float]]:
    """(index of the smallest assignment with PSNR >= target, all that was measured); None where even the largest has less.

    Measured PSNR is taken to rise as the predicted error falls. A straight line through what was measured says where to
    look next, always strictly between the largest that failed and the smallest that passed, so every step narrows it.

    Args:
        errors_db: predicted error of each assignment in dB, falling, from the smallest assignment to the largest.
        measure: PSNR in dB of the assignment with an index; called at most `most` times.
    """
    failed, passed = -1, len(errors_db)
    found: dict[int, float] = {}
    place = len(errors_db) // 2
    while passed - failed > 1 and len(found) < most:
        found[place] = measure(place)
        if found[place] >= target:
            passed = min(passed, place)
        else:
            failed = max(failed, place)
        place = _next(errors_db, found, target, failed, passed)
    if passed == len(errors_db) and failed < len(errors_db) - 1:
        last = len(errors_db) - 1
        found[last] = measure(last)
        passed = last if found[last] >= target else passed
    return (passed if passed < len(errors_db) else None), found


def _next(errors_db: Sequence[float], found: dict[int, float], target: float, failed: int, passed: int) -> int:
    near = sorted(found, key=lambda place: abs(found[place] - target))[:2]
    slope = SLOPE
    if len(near) == 2 and errors_db[near[0]] != errors_db[near[1]]:
        slope = (found[near[0]] - found[near[1]]) / (errors_db[near[1]] - errors_db[near[0]])
        slope = min(max(slope, SLOPES[0]), SLOPES[1]) if math.isfinite(slope) else SLOPE
    wanted = errors_db[near[0]] - (target - found[near[0]]) / slope
    guess = next((place for place, error in enumerate(errors_db) if error <= wanted), len(errors_db) - 1)
    return min(max(guess, failed + 1), max(passed - 1, failed + 1))
