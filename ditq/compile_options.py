"""Everything of a compile but the checkpoint, the recipe and the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ditq.budget import Budget
from ditq.devices import AUTO
from ditq.progress import ProgressSetting

OFFLOAD = (AUTO, "disk", "none")


@dataclass(frozen=True)
class CompileOptions:
    """Everything of a compile but the checkpoint, the recipe and the output.

    Attributes:
        target: name of an export target, see `ditq targets`.
        conditions: prompts (or labels) to calibrate on: a list, a file, or None for the built-in ones.
        limit: how many of them to use at most; None is the default of `calibrate`.
        steps: denoising steps of calibration; None is the checkpoint's own.
        statistics: a folder that `ditq calibrate` wrote, instead of calibrating now.
        budget: formats of single linears are chosen so that this holds: `size=4.2MB`, `bits=3.5`, `psnr>=24`; or attentions:
            `attention_macs=0.3`, at most that share of the multiply-adds of softmax. Over a recipe's.
        device: where the model runs while it is calibrated, and where weights are rounded: `auto`, `cpu`, `cuda` (devices.py).
        offload: whether the float32 weights stand on disk while passes work on them: `disk`, `none`, or `auto`, which is where
            they would take more than half of the memory that is free. The files lie beside the output and have no names.
        seed: seed of every random choice.
        resume: go on where an interrupted compile of the same output stopped.
        force: replace the output folder if it exists.
        cache_text: what sees only the text runs once for a prompt instead of at every step, where the model has keys and
            values of attention among it. Exact.
        gpus: kinds of GPU that plans are built for, such as `sm89`, by a target that has such; none: the GPU that is here, or
            sm80, sm89 and sm120.
        sizes: of the axes that may vary, for these plans: `batch=1:2:4,image_tokens=4096`, smallest, usual and largest.
    """

    target: str = "onnxruntime-cpu"
    conditions: str | Path | Sequence[str | int] | None = None
    limit: int | None = None
    steps: int | None = None
    statistics: str | Path | None = None
    budget: Budget | str | None = None
    device: str = AUTO
    offload: str = AUTO
    seed: int = 0
    resume: bool = False
    force: bool = False
    cache_text: bool = True
    gpus: Sequence[str] = ()
    sizes: str | None = None
    progress: ProgressSetting = None
