"""Salience: how large a channel of an input counts for smoothing, over all timesteps or by timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from ditq.calibration.input_statistics import InputStatistics

SALIENCES = ("absmax", "rms", "spearman", "extremes")
STILL = 16  # roundings of a mean, by bins and over them


def channel_sizes(salience: str, statistics: InputStatistics, mean: Tensor, weights: Tensor) -> Tensor:
    """float64 [C]: the size of every channel of x - mean. mean [C] is zero where channels are not centred.

    - absmax: the largest magnitude over all timesteps;
    - rms: the root of the mean square;
    - spearman: the bins' largest magnitudes s_t averaged with weights softmax_t(-rho_t), rho_t the Spearman correlation of
      s_t with the weights' largest magnitudes [C]: a timestep whose large channels meet small weights can give most and counts
      most (PTQ4DiT, Wu 2024, arXiv 2405.16005, eq. 8-11);
    - extremes: the larger of the first and the last bin, where a trajectory is noisiest and cleanest.
    """
    if salience == "rms":
        return (
            (statistics.channel_rms.double().square() - 2 * mean * statistics.mean().double() + mean**2)
            .clamp_min(0)
            .sqrt()
        )
    by_bin = _by_bin(statistics, mean)
    if salience == "spearman":
        rho = torch.stack([spearman(size, weights) for size in by_bin])
        return torch.softmax(-rho, 0) @ by_bin
    return (by_bin[[0, -1]] if salience == "extremes" else by_bin).amax(0)


def still(statistics: InputStatistics, mean: Tensor) -> Tensor:
    """bool [C]: channels that all sampled rows have at their mean [C], up to the rounding of means to float32."""
    rounding = STILL * torch.finfo(torch.float32).eps
    return _by_bin(statistics, mean).amax(0) <= rounding * mean.abs()


def _by_bin(statistics: InputStatistics, mean: Tensor) -> Tensor:
    """float64 [bins that have rows, C]: max|x - mean|; of the sampled rows where there is a mean to subtract."""
    if not bool(mean.any()):
        return statistics.absmax.double()[statistics.count > 0]
    centred = (statistics.sample.double() - mean).abs()
    filled = statistics.sample_bin.unique().tolist()
    return torch.stack([centred[statistics.sample_bin == number].amax(0) for number in filled])


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of two vectors [C], float64; equal values share the mean of their ranks. 0 if one is constant."""
    ranks = [_ranks(a), _ranks(b)]
    x, y = (rank - rank.mean() for rank in ranks)
    return (x @ y) / (x.norm() * y.norm()).clamp_min(1e-300)


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]
