"""How much an error made at one denoising step counts in the end: the weights that probing.py measures.

With e_t a change of the denoiser's output at step t and z the last latents,

    effect_t = ||dz||^2 / ||e_t||^2     what an error of the denoiser's output is worth
    share_t  = ||dz||^2                 where every linear at every step has the same relative error: what an error of a
                                        layer is worth, its way through the blocks included

Both have a mean of 1 over the steps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ditq.calibration.storage import write_json
from ditq.checkpoint import read_json
from ditq.errors import DitqError

FILE = "step_weights.json"
KINDS = ("effect", "share")


@dataclass(frozen=True)
class StepWeights:
    """Weights of the steps of a trajectory, first step first, with a mean of 1."""

    effect: tuple[float, ...]
    share: tuple[float, ...]

    def by_step(self, kind: str = "effect") -> Tensor:
        """[T], `effect` for errors of the denoiser's output, `share` for relative errors of layers.

        Raises:
            ValueError: for another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"step weights are of {' or '.join(KINDS)}, not {kind!r}")
        return torch.tensor(getattr(self, kind), dtype=torch.float64)

    def by_bin(self, bins: int, kind: str = "effect") -> Tensor:
        """[bins]: the mean over the steps of each timestep bin; 0 for a bin without a step."""
        weights = self.by_step(kind)
        places = torch.arange(len(weights)) * bins // len(weights)
        sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, weights)
        return sums / torch.bincount(places, minlength=bins).clamp_min(1)

    @classmethod
    def read(cls, folder: Path) -> StepWeights | None:
        """What `write` put there; None where nothing is. Raises DitqError for a damaged file."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            values = read_json(path)
            found = cls(*(tuple(float(value) for value in values[kind]) for kind in KINDS))
        except (KeyError, TypeError, ValueError) as error:
            raise DitqError(f"{path}: damaged; remove it and calibrate again with --resume --step-weights") from error
        weights = (*found.effect, *found.share)
        sound = len(found.effect) == len(found.share) and all(math.isfinite(one) and one >= 0 for one in weights)
        if not sound or not all(sum(getattr(found, kind)) > 0 for kind in KINDS):
            raise DitqError(f"{path}: damaged; remove it and calibrate again with --resume --step-weights")
        return found

    def write(self, folder: Path) -> None:
        """Into a folder of statistics."""
        write_json(folder / FILE, asdict(self))
