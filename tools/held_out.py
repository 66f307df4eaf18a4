"""What a changed denoiser has lost on held-out prompts: in its answers, and in pictures drawn from the same noise.

Everything is float32, on a GPU too, so that figures of one machine stand beside those of another.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ditq.calibration.batches import CallBatch, moved, sampled_batches
from ditq.calibration.record import record_trajectories
from ditq.calibration.sampling import SamplingSettings
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.passes import Context, PassReport
from ditq.passes.base import Pass
from ditq.report.feature_distance import lite0_frechet_distance
from tools.measure_denoiser import Denoiser
from tools.peers.draw import Drawn, draw

JUDGED = 8  # prompts along whose trajectories answers are compared
TOGETHER = 16  # samples of a call


class HeldOut:
    """The original's answers and pictures of held-out conditions, and what others differ by.

    Attributes:
        wanted: what the original draws, condition i from the noise of `seed + i`.

    `arguments` are the pipeline's, over the checkpoint's own.
    """

    def __init__(
        self,
        opened: Checkpoint,
        conditions: Sequence[str | int],
        seed: int,
        device: torch.device,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.conditions, self.seed, self.device = list(conditions), seed, device
        settings = SamplingSettings.for_checkpoint(opened, None, seed, arguments or {})
        self._arguments = dict(settings.arguments)
        self._pipeline = opened.load_pipeline().to(device)
        original = self._pipeline.transformer
        with tempfile.TemporaryDirectory() as folder:
            some = self.conditions[:JUDGED]
            calls = record_trajectories(opened, some, settings, Path(folder) / "calls", False, pipeline=self._pipeline)
            batches = [
                CallBatch(moved(batch.arguments, device), batch.steps, batch.branches)
                for batch in sampled_batches(calls, 1 << 30, TOGETHER)
            ]
            self._judge = Denoiser(original, batches, calls.steps, None, None)
        self.wanted = self._drawn(original)

    def _drawn(self, model: nn.Module) -> Drawn:
        self._pipeline.transformer = model
        return draw(self._pipeline, self.conditions, self._arguments, self.seed, TOGETHER)

    def of(self, model: nn.Module) -> tuple[str, Drawn]:
        """(signal to error of the model's answers in dB, what it draws); the model stays where it was."""
        place = next(model.parameters()).device
        model.to(self.device)
        try:
            return self._judge.figures(model)[1], self._drawn(model)
        finally:
            model.to(place)

    def psnr(self, drawn: Drawn) -> float:
        """Of pictures to the original's: the mean in dB."""
        a, b = (torch.from_numpy(found.pictures).double() for found in (self.wanted, drawn))
        errors = (a - b).square().flatten(1).mean(1).clamp_min(1e-3)
        return float((10 * torch.log10(255**2 / errors)).mean())


def distance(a: np.ndarray, b: np.ndarray) -> str:
    """lite0-FD of pictures uint8 [N, H, W, 3], where its package is installed."""
    found = lite0_frechet_distance(list(a), list(b))
    return "" if found is None else f"{found:.1f}"


class Changed:
    """A checkpoint's model after structural passes, from which several others are trained.

    Attributes:
        reports: of those passes.
    """

    def __init__(self, opened: Checkpoint, passes: Sequence[Pass], context: Context) -> None:
        self._context = context
        self.graph = DiTGraph(opened.load_model(), example_inputs(opened))
        with torch.no_grad():
            self.reports = [step.run(self.graph, context) for step in passes]

    def after(self, passes: Sequence[Pass]) -> tuple[DiTGraph, list[PassReport]]:
        """A copy of it after further structural passes, and their reports."""
        graph = copy.deepcopy(self.graph)
        with torch.no_grad():
            return graph, [step.run(graph, self._context) for step in passes]


def context_of(opened: Checkpoint, statistics: Statistics) -> Context:
    """What structural passes over the checkpoint's model share."""
    context = Context(statistics)
    context.original = opened.load_model()
    return context
