"""Timesteps find the bin that calibration put their step in."""

from __future__ import annotations

import pytest
import torch

from ditq.numerics.timestep_bins import bin_edges, bin_of


@pytest.mark.parametrize(("steps", "bins"), [(20, 4), (7, 3), (3, 5), (1, 4), (10, 1)])
@pytest.mark.parametrize("unit", [1.0, 0.001])
def test_every_step_falls_into_its_own_bin(steps: int, bins: int, unit: float) -> None:
    timesteps = [unit * (1000 - 990 * step / steps) for step in range(steps)]
    held, edges = bin_edges(timesteps, bins)
    assert held == sorted({step * bins // steps for step in range(steps)}) and len(edges) == len(held) - 1
    for step, timestep in enumerate(timesteps):
        assert held[int(bin_of(torch.tensor([timestep, 0.0]), edges))] == step * bins // steps


def test_other_samplings_take_the_nearest_bin() -> None:
    _, edges = bin_edges([1000, 900, 300, 100], 2)
    assert edges == (600.0,)
    assert [int(bin_of(torch.tensor(t), edges)) for t in (2000, 601, 600, 599, -5)] == [0, 0, 0, 1, 1]


def test_timesteps_that_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fall"):
        bin_edges([0, 250, 500, 750], 2)
