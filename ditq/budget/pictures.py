"""Mean PSNR of pictures that an assignment draws, against the original's, on prompts of the calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ditq.calibration.record import Trajectories
from ditq.calibration.sampling import SamplingSettings, sample
from ditq.checkpoint import Checkpoint
from ditq.progress import ProgressSetting
from ditq.report.metrics import psnr

PICTURES = 8
HIGHEST = 100.0  # dB at which identical pictures count in the mean


class Pictures:
    """The original's pictures, drawn once, and the pipeline to draw others from the same noise."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        original: nn.Module,
        trajectories: Trajectories,
        count: int = PICTURES,
        progress: ProgressSetting = None,
    ) -> None:
        self.conditions: Sequence[str | int] = trajectories.conditions[:count]
        self.settings = SamplingSettings(dict(trajectories.index["arguments"]), int(trajectories.index["seed"]))
        self.progress = progress
        self.pipeline: Any = checkpoint.load_pipeline(original)
        self.reference = self._draw(original)

    def psnr(self, model: nn.Module) -> float:
        """Mean over the pictures, in dB."""
        values = [min(psnr(a, b), HIGHEST) for a, b in zip(self.reference, self._draw(model), strict=True)]
        return float(np.mean(values))

    @torch.no_grad()
    def _draw(self, model: nn.Module) -> list[np.ndarray]:
        self.pipeline.transformer = model
        drawn = sample(self.pipeline, self.conditions, self.settings, progress=self.progress)
        return [np.asarray(item.image) for item in drawn]
