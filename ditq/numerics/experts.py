"""Dividing a feed-forward's hidden channels among experts: what matters most, what is active together, whom a token asks.

a [M, H] are hidden activations of M tokens, W [O, H] the linear that reads them, y = a W^T + b. Tokens may count differently,
by weights w [M]: means and squares are weighted everywhere.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

ROUNDS = 16  # of `least_needed`: in each an equal part of the channels goes
BALANCING = 300
DAMPING = 1e-3  # of a Gram matrix, relative to its mean diagonal


def covariance_of(a: Tensor, w: Tensor) -> Tensor:
    """[H, H] in float64."""
    centred = a.double() - weighted_mean(a, w)
    return (centred * w.double()[:, None]).T @ centred / w.double().sum()


def weighted_mean(a: Tensor, w: Tensor) -> Tensor:
    """[H] in float64."""
    return w.double() @ a.double() / w.double().sum()


def activation_importance(covariance: Tensor, weight: Tensor) -> Tensor:
    """var(a_j) ||w_j||^2: what the output loses where channel j becomes its mean, all others alike. [H]."""
    return covariance.double().diagonal() * weight.double().square().sum(dim=0)


def needed_importance(covariance: Tensor, weight: Tensor, keep: int) -> Tensor:
    """How late a channel goes where those least needed go first and the others make up for them: ranks [H], largest last.

    In each round channel j costs ||w_j||^2 / [C^-1]_jj, C the covariance [H, H] of the channels that are left, and W is
    refitted. The structured form of the optimal brain surgeon (Hassibi and Stork, 1992). Channels that are kept to the end,
    `keep` of them, are ranked by what they cost then.
    """
    covariance, weight = covariance.double(), weight.double()
    channels = len(covariance)
    ranks = torch.zeros(channels, dtype=torch.float64)
    left = torch.arange(channels)
    refitted = weight
    size = max(1, -(-(channels - keep) // ROUNDS))
    while True:
        inverse = torch.linalg.inv(damped(covariance[left][:, left]))
        cost = refitted.square().sum(dim=0) / inverse.diagonal()
        going = min(size, len(left) - keep)
        if going <= 0:
            ranks[left] = channels - len(left) + cost.argsort().argsort().double()
            return ranks
        order = cost.argsort()
        ranks[left[order[:going]]] = torch.arange(channels - len(left), channels - len(left) + going).double()
        left = left[order[going:].sort().values]
        refitted = _refit(covariance, weight, left)


def _refit(covariance: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The columns [O, K] of the kept channels that give most nearly what all of them gave."""
    inner = damped(covariance[kept][:, kept])
    return torch.linalg.solve(inner, covariance[kept] @ weight.T).T


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """gram + damping * mean(diagonal) I, in float64."""
    gram = gram.double()
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (damping * gram.diagonal().mean() + 1e-30)


def balanced_assignment(cost: Tensor) -> Tensor:
    """Give each of n things to one of g groups of n / g things each at the least total cost [n, g]: int64 [n].

    Exact: from the cheapest assignment without sizes on, things move along shortest paths from groups that hold too many to
    groups that hold too few (successive shortest paths of minimum-cost flow). scipy's linear_sum_assignment, with a column a
    seat, finds the same; for the 9216 channels of a FLUX layer it takes 17 s a round and 0.7 GB, this 0.1 s.
    """
    n, g = cost.shape
    if n % g:
        raise ValueError(f"{n} things cannot be given to {g} groups of one size")
    costs = cost.double().numpy()
    given = costs.argmin(axis=1)
    count, size = np.bincount(given, minlength=g), n // g
    # step[e, f]: the least that moving one thing of group e to f costs, and which thing that is
    step, mover = np.full((g, g), np.inf), np.zeros((g, g), dtype=np.int64)

    def look_at(group: int) -> None:
        held = np.flatnonzero(given == group)
        step[group] = np.inf
        if len(held):
            more = costs[held] - costs[held, group, None]
            least = more.argmin(axis=0)
            step[group], mover[group] = more[least, np.arange(g)], held[least]
            step[group, group] = np.inf

    for group in range(g):
        look_at(group)
    while (count > size).any():
        path = _shortest_path(step, count > size, count < size)
        movers = [mover[a, b] for a, b in pairwise(path)]
        given[movers] = path[1:]
        count[path[0]] -= 1
        count[path[-1]] += 1
        for group in path:
            look_at(group)
    return torch.from_numpy(given)


def _shortest_path(step: np.ndarray, full: np.ndarray, open_: np.ndarray) -> list[int]:
    """Groups on the cheapest way from a full one to an open one (Bellman and Ford)."""
    distance = np.where(full, 0.0, np.inf)
    before = np.full(len(step), -1)
    for _ in range(len(step)):
        through = distance[:, None] + step
        best = through.argmin(axis=0)
        shorter = through[best, np.arange(len(step))]
        better = shorter < distance - 1e-12
        if not better.any():
            break
        distance, before = np.where(better, shorter, distance), np.where(better, best, before)
    path = [int(np.where(open_, distance, np.inf).argmin())]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]


def cluster_channels(a: Tensor, groups: int, seed: int = 0, rounds: int = 8) -> Tensor:
    """Channels that are active for the same tokens, in groups of one size: int64 [H].

    Balanced k-means by the cosine of the standardized activations, as CMoE (Pei et al., arXiv 2502.04416) does with an exact
    assignment, from starting points drawn as by k-means++.
    """
    standard = (a - a.mean(dim=0)) / a.std(dim=0).clamp_min(1e-12)
    points = torch.nn.functional.normalize(standard.T, dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < groups:
        far = (1 - (points @ centres.T).max(dim=1).values).clamp_min(0) + 1e-9
        centres = torch.cat((centres, points[torch.multinomial(far, 1, generator=generator)]))
    given = balanced_assignment(-points @ centres.T)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, given, points)
        again = balanced_assignment(-points @ torch.nn.functional.normalize(sums, dim=1).T)
        if bool((again == given).all()):
            break
        given = again
    return given


def contributions(a: Tensor, mean: Tensor, weight: Tensor, given: Tensor, groups: int) -> Tensor:
    """||sum_{j in e} (a_j - mean_j) w_j||: how far each expert moves the output of a token from its mean. [M, E]."""
    centred = a - mean
    moved = [(centred[:, given == group] @ weight[:, given == group].T).norm(dim=1) for group in range(groups)]
    return torch.stack(moved, dim=1)


def ridge(
    x: Tensor, y: Tensor, w: Tensor, start: Tensor | None = None, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """(W [O, I], b [O]) with the least sum_m w_m ||W x_m + b - y_m||^2 + a little ||W - start||^2, x [M, I], y [M, O].

    W = W0 + (Y - X W0^T)^T X (X^T X + damping)^-1 of what is centred, as the intercept is free; W0 is `start`, or zero.
    """
    x, y, w = x.double(), y.double(), w.double()
    mean_x, mean_y = weighted_mean(x, w), weighted_mean(y, w)
    root = w.sqrt()[:, None]
    centred, left = (x - mean_x) * root, (y - mean_y) * root
    fitted = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64) if start is None else start.double()
    left = left - centred @ fitted.T
    fitted = fitted + torch.linalg.solve(damped(centred.T @ centred, damping), centred.T @ left).T
    return fitted, mean_y - fitted @ mean_x


def balance_offset(scores: Tensor, top: int, most: float) -> Tensor:
    """What to add to the scores [M, E] so that no expert is among the best `top` of more than `most` times its share: [E].

    Small steps against the load, after auxiliary-loss-free balancing (Wang et al., arXiv 2408.15664); no more than is needed.
    """
    offset = torch.zeros(scores.shape[1], dtype=scores.dtype)
    size = float(scores.std())
    for number in range(BALANCING):
        chosen = (scores + offset).topk(top, dim=1).indices
        load = torch.bincount(chosen.flatten(), minlength=scores.shape[1]) / (len(scores) * top / scores.shape[1])
        if float(load.max()) <= most and float(load.min()) >= 1 / (2 * most):
            break
        offset -= 0.05 * size * (1 - number / BALANCING) * (load.clamp_max(4.0) - 1)
    return offset - offset.mean()
