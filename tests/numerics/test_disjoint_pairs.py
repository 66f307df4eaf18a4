"""The least sum of disjoint pairs, against all sets of pairs that there are."""

from __future__ import annotations

import itertools
import random

import pytest

from ditq.numerics.disjoint_pairs import least_pairs


@pytest.mark.parametrize("seed", range(12))
def test_no_other_set_of_disjoint_pairs_costs_less(seed: int) -> None:
    generator = random.Random(seed)
    chains, start = [3, 4 + seed % 3, 2], 0
    pairs: list[tuple[int, int]] = []
    for length in chains:
        pairs += [(start + i, start + i + 1) for i in range(length - 1)]
        start += length
    pairs = [found for found in pairs if generator.random() > 0.1]
    costs = [generator.random() for _ in pairs]
    for count in (1, 2, 3, 9):
        sets = [
            some
            for size in range(count + 1)
            for some in itertools.combinations(range(len(pairs)), size)
            if len({block for number in some for block in pairs[number]}) == 2 * len(some)
        ]
        most = max(map(len, sets))
        best = min((some for some in sets if len(some) == most), key=lambda some: sum(costs[n] for n in some))
        found = least_pairs(pairs, costs, count)
        assert len(found) == most and sum(costs[n] for n in found) == pytest.approx(sum(costs[n] for n in best))


def test_without_pairs_there_is_nothing_to_choose() -> None:
    assert least_pairs([], [], 2) == []
