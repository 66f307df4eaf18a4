"""Drawing many pictures at a time with a diffusers pipeline, text encoded once, the same noise for every model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Call = dict[str, Any]
WATCHED_STEPS = 6
WATCHED_SAMPLES = 4


@dataclass(frozen=True)
class Drawn:
    """pictures uint8 [N, H, W, 3]; latents float32 [N, ...], the last ones; some calls of the denoiser."""

    pictures: np.ndarray
    latents: np.ndarray
    calls: list[Call]


@torch.no_grad()
def draw(
    pipeline: Any,
    conditions: Sequence[str | int],
    arguments: dict[str, Any],
    seed: int,
    batch: int,
    watch: bool = False,
) -> Drawn:
    """Draw condition i from the noise of `seed + i`, `batch` at a time; both guidance branches run for a whole batch.

    watch: keep the denoiser's arguments at a few steps of the first batch, at most `WATCHED_SAMPLES` samples each.
    """
    pipeline.set_progress_bar_config(disable=True)
    _encode_once(pipeline)
    pictures, latents, calls = [], [], _Calls()
    for start in range(0, len(conditions), batch):
        part = list(conditions[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + place) for place in range(len(part))]
        size = WATCHED_SAMPLES if start == 0 and watch else 0
        with _LastLatents(pipeline.scheduler) as last, calls.of(pipeline.transformer, min(size, len(part))):
            # A negative prompt is given for each prompt; all else is the same for all.
            given = {
                key: [value] * len(part) if key == "negative_prompt" else value for key, value in arguments.items()
            }
            found = pipeline(prompt=part, generator=generators, output_type="np", **given).images
        pictures.append((np.asarray(found) * 255).round().astype(np.uint8))
        latents.append(last.latents.float().cpu().numpy())
    kept = calls.kept
    step = max(1, len(kept) // WATCHED_STEPS)
    return Drawn(np.concatenate(pictures), np.concatenate(latents), kept[::step][:WATCHED_STEPS])


def _encode_once(pipeline: Any) -> None:
    """Let the pipeline remember what it has encoded."""
    if hasattr(pipeline, "_plain_encode"):
        return
    pipeline._plain_encode = plain = pipeline.encode_prompt
    known: dict[str, Any] = {}

    def encode(*positional: Any, **named: Any) -> Any:
        key = repr((positional, sorted(named.items())))
        if key not in known:
            known[key] = plain(*positional, **named)
        return known[key]

    pipeline.encode_prompt = encode


class _LastLatents:
    """Within it, `latents` are those that the scheduler returned last."""

    latents: torch.Tensor

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.plain = scheduler, scheduler.step

    def __enter__(self) -> _LastLatents:
        @functools.wraps(self.plain)
        def step(*positional: Any, **named: Any) -> Any:
            output = self.plain(*positional, **named)
            self.latents = output[0]
            return output

        self.scheduler.step = step
        return self

    def __exit__(self, *_: Any) -> None:
        self.scheduler.step = self.plain


class _Calls:
    """Arguments of the denoiser, by name, of the first samples of a batch."""

    def __init__(self) -> None:
        self.kept: list[Call] = []
        self.size = 0

    def of(self, model: nn.Module, size: int) -> Any:
        self.size = size
        return _Hook(model, self) if size else _Nothing()

    def __call__(self, module: Any, positional: tuple[Any, ...], named: Call) -> None:
        bound = inspect.signature(module.forward).bind(*positional, **named).arguments
        batch = bound["hidden_states"].shape[0]
        self.kept.append({name: _some(name, value, batch, self.size) for name, value in bound.items()})


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class _Hook(_Nothing):
    def __init__(self, model: nn.Module, calls: _Calls) -> None:
        self.handle = model.register_forward_pre_hook(calls, with_kwargs=True)

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def _some(name: str, value: Any, batch: int, size: int) -> Any:
    """`size` samples of a batch, evenly spread, so that both guidance branches are among them; position ids as they are."""
    if isinstance(value, dict):
        return {key: _some(key, item, batch, size) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch and not name.endswith("_ids"):
        return value[:: max(1, batch // size)][:size].clone()
    return value
