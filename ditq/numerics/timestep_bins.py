"""Bins of timesteps: calibration divides a trajectory's steps equally into bins; at run time the timestep tells the bin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def bin_edges(timesteps: Sequence[float], bins: int) -> tuple[list[int], tuple[float, ...]]:
    """The timestep at each step, falling -> (the bins that hold a step, the edges between them: midway, falling).

    Raises:
        ValueError: timesteps that do not fall from each bin to the next.
    """
    members: dict[int, list[float]] = {}
    for step, timestep in enumerate(timesteps):
        members.setdefault(step * bins // len(timesteps), []).append(timestep)
    held = sorted(members)
    gaps = [(min(members[earlier]), max(members[later])) for earlier, later in pairwise(held)]
    if any(above <= below for above, below in gaps):
        raise ValueError("the timesteps do not fall along the trajectory")
    return held, tuple((above + below) / 2 for above, below in gaps)


def bin_of(timestep: Tensor, edges: Sequence[float]) -> Tensor:
    """Index of the bin, int64 []: how many edges the timestep lies below. Of a batch, that of the first sample."""
    return bins_of(timestep.reshape(-1)[:1], edges)[0]


def bins_of(timesteps: Tensor, edges: Sequence[float]) -> Tensor:
    """The same of each of the timesteps [B] or []: int64 [B] or [1]."""
    found = timesteps.reshape(-1, 1).float()
    return (found < torch.tensor(edges, dtype=torch.float32, device=found.device)).sum(dim=1)
