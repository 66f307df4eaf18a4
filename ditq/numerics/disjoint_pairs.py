"""Disjoint pairs of neighbours of least cost in sum, by dynamic programming."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import inf


def least_pairs(pairs: Sequence[tuple[Hashable, Hashable]], costs: Sequence[float], count: int) -> list[int]:
    """The numbers of `count` pairs without a common member, least in the sum of their costs; of as many as there can be.

    pairs: in order, so that only those that follow each other can have a member in common. With

        f(i, k) = min( f(i + 1, k),  c_i + f(j, k - 1) )    j: the next pair that shares nothing with pair i

    the least sum of k of the pairs from i on.
    """
    size = len(pairs)
    after = [i + 1 + int(i + 1 < size and bool(set(pairs[i]) & set(pairs[i + 1]))) for i in range(size)]
    least = [[0.0] + [inf] * count for _ in range(size + 2)]
    for i in reversed(range(size)):
        for k in range(1, count + 1):
            least[i][k] = min(least[i + 1][k], costs[i] + least[after[i]][k - 1])
    wanted = max(k for k in range(count + 1) if least[0][k] < inf)
    chosen, i = [], 0
    while wanted:
        if least[i][wanted] < least[i + 1][wanted]:
            chosen.append(i)
            i, wanted = after[i], wanted - 1
        else:
            i += 1
    return chosen
