"""What quantizing costs, by what is counted: the last latents of trajectories where that can be found, else single calls.

Errors of the modulation are small but alike at every step. Single calls do not see that such errors add up along the
trajectory. So by them a linear whose format a rule of the recipe gives, as the shipped ones do for the modulation, has
no choice.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ditq.budget.along_trajectory import AlongTrajectories
from ditq.budget.choices import Choices
from ditq.budget.sensitivity import SingleCalls
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.graph import DiTGraph
from ditq.progress import ProgressSetting


class Cost(Protocol):
    """A relative squared error, of what `unit` says; `adds_up` where all steps of a trajectory count together."""

    @property
    def unit(self) -> str: ...

    @property
    def adds_up(self) -> bool: ...

    def candidates(
        self, graph: DiTGraph, choices: Choices, *, seed: int = 0, progress: ProgressSetting = None
    ) -> NDArray[np.float64]:
        """[N, F]: of each candidate of each linear alone."""
        ...

    def assignment(self, graph: DiTGraph, choices: Choices, choice: NDArray[np.int64]) -> float:
        """Of all linears together, with that choice [N]."""
        ...


def find_cost(
    model: nn.Module,
    trajectories: Trajectories,
    statistics: Statistics,
    seed: int = 0,
    recorded: nn.Module | None = None,
) -> Cost:
    """Along trajectories where the sampler is linear in the denoiser's answers, as deterministic ones are, else of calls.

    Args:
        model: in full precision, after the passes before `quantize`.
        recorded: the model that the trajectories were recorded with, where structural passes have made another of it.
    """
    found = AlongTrajectories.of(model, trajectories, recorded)
    return found or SingleCalls.of(model, trajectories, statistics, seed)
