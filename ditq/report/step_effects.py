"""What the engine's error of each single step does to the last latents: the original draws on, given that error once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ditq.calibration.probing import PROBED_STEPS, draw_copies
from ditq.calibration.prompts import spread
from ditq.calibration.sampling import SamplingSettings
from ditq.report.metrics import relative_error


@torch.no_grad()
def step_effects(
    pipeline: Any,
    condition: str | int,
    settings: SamplingSettings,
    index: int,
    errors: Mapping[int, Sequence[Tensor]],
) -> dict[int, float]:
    """||z - z_t||^2 / ||z||^2 of the last latents by step, z_t drawn by the original with the engine's error at step t alone.

    All are drawn at once, as copies of the sample of the condition at place `index`.

    Args:
        errors: by step, what the engine's output is off by in each of its calls, on the original's inputs. At most
            `PROBED_STEPS` of the steps are taken, evenly.
    """
    steps = spread(sorted(errors), PROBED_STEPS)
    copies = 1 + len(steps)

    def change(step: int, call: int, output: Tensor) -> Tensor:
        if step not in steps:
            return output
        changed = output.clone()
        changed[1 + steps.index(step) :: copies] += errors[step][call].to(output.device, output.dtype)
        return changed

    last = draw_copies(pipeline, condition, settings, index, copies, change)
    return {step: relative_error(last[0], last[1 + place]) for place, step in enumerate(steps)}
