"""Measuring what an error at each denoising step is worth in the end (step_weights.py), along real trajectories.

Several copies of one sample are drawn at once from the same noise. Copy j differs from the first one at step t_j alone, by
what is done to the denoiser there; from then on it goes its own way. The change is a little noise behind every token
linear, as rounding makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ditq.calibration.prompts import spread
from ditq.calibration.sampling import DenoiserCall, SamplingSettings, sample_one
from ditq.calibration.step_weights import StepWeights
from ditq.errors import DitqError
from ditq.progress import ProgressSetting, progress_bar

PROBED_STEPS, PROBED_CONDITIONS = 10, 4
NOISE = 0.01  # relative to the RMS of a linear's output: small enough that twice as much has four times the effect

Change = Callable[[int, int, Tensor], Tensor]
"""(step, number of the call within the step, the denoiser's output [k * copies, ...]) -> what it gives instead."""


@torch.no_grad()
def measure_step_weights(
    pipeline: Any,
    linears: Mapping[str, nn.Module],
    conditions: Sequence[str | int],
    settings: SamplingSettings,
    steps: int,
    progress: ProgressSetting = None,
) -> StepWeights:
    """Probe the pipeline's denoiser: `PROBED_STEPS` of the steps, evenly, on `PROBED_CONDITIONS` of the conditions.

    Args:
        linears: the token linears, by name; their outputs are [k * copies, ..., O].
        steps: scheduler steps of a trajectory. Weights of steps between the probed ones are interpolated in their logarithm.

    Raises:
        DitqError: an output that has another first dimension, or a probe that changes nothing.
    """
    probed = sorted(set(spread(range(steps), PROBED_STEPS)) | {0, steps - 1})
    copies = 1 + len(probed)
    given, caused = torch.zeros(len(probed), dtype=torch.float64), torch.zeros(len(probed), dtype=torch.float64)
    chosen, called = list(spread(range(len(conditions)), PROBED_CONDITIONS)), set[int]()
    with progress_bar("measuring what each step is worth", len(chosen), progress) as bar:
        for index in chosen:
            noise = _Noise(probed, copies, settings.seed + index)

            def seen(step: int, call: int, output: Tensor, noise: _Noise = noise) -> Tensor:
                called.add(step)
                for row in noise.rows_of(step):
                    difference = output[row::copies].double() - output[0::copies].double()
                    given[row - 1] += difference.square().sum().cpu()
                return output

            with noise.behind(linears):
                last = draw_copies(pipeline, conditions[index], settings, index, copies, seen, noise.at)
            caused += (last[1:] - last[:1]).double().flatten(1).square().sum(1)
            bar.advance()
    if missed := [step for step in probed if step not in called]:
        raise DitqError(
            f"the pipeline does not call its transformer at step {missed[0]}, which another denoiser draws, so that what it is "
            "worth cannot be told; leave --step-weights out"
        )
    if not (given > 0).all() or not (caused > 0).all():
        raise DitqError("a small error of the denoiser changes nothing at some step; leave --step-weights out")
    return StepWeights(_filled(caused / given, probed, steps), _filled(caused, probed, steps))


def draw_copies(
    pipeline: Any,
    condition: str | int,
    settings: SamplingSettings,
    index: int,
    copies: int,
    change: Change,
    before_call: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """The last latents [copies, ...] of one sample drawn `copies` times at once, with `change` of every denoiser output.

    A call's batch is k times the copies (k = 2 where guidance joins its branches): copy j is every row j + i * copies.
    """
    step, call = -1, 0

    def before(told: DenoiserCall) -> None:
        nonlocal step, call
        step, call = told.step, call + 1 if told.step == step else 0
        before_call(step)

    def after(_module: nn.Module, _given: Any, output: Any) -> Any:
        tensor = output if isinstance(output, Tensor) else output[0]
        _check_rows(tensor, copies, "the denoiser's output")
        changed = change(step, call, tensor)
        if changed is not tensor:
            tensor.copy_(changed)  # in place, so that it stays in whatever class the denoiser has put it into

    handle = pipeline.transformer.register_forward_hook(after)
    try:
        return sample_one(
            pipeline, condition, settings, index, on_denoiser_call=before, decode=False, copies=copies
        ).latents[:copies]  # some pipelines step both guidance branches
    finally:
        handle.remove()


class _Noise:
    """Adds noise to the outputs of linears: to copy j at the step probed[j - 1], to the first copy never."""

    def __init__(self, probed: Sequence[int], copies: int, seed: int) -> None:
        self._probed, self._copies, self._step = probed, copies, -1
        self._generator = torch.Generator().manual_seed(seed)

    def at(self, step: int) -> None:
        """A call of that step begins."""
        self._step = step

    def rows_of(self, step: int) -> Iterator[int]:
        """The copy that is changed at that step, if one is."""
        return (1 + place for place, probed in enumerate(self._probed) if probed == step)

    @contextmanager
    def behind(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, linear in linears.items():
                hooks.callback(linear.register_forward_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def add(_module: nn.Module, _given: Any, output: Tensor) -> Tensor | None:
            rows = list(self.rows_of(self._step))
            if not rows:
                return None
            _check_rows(output, self._copies, f"the output of {name}")
            output = output.clone()
            for row in rows:
                part = output[row :: self._copies]
                noise = torch.randn(part.shape, generator=self._generator).to(part.device, part.dtype)
                output[row :: self._copies] = part + NOISE * part.square().mean().sqrt() * noise
            return output

        return add


def _check_rows(tensor: Tensor, copies: int, what: str) -> None:
    if tensor.shape[0] % copies:
        raise DitqError(
            f"{what} has {tensor.shape[0]} rows for {copies} samples, so that no step can be probed; "
            "leave --step-weights out"
        )


def _filled(values: Tensor, probed: Sequence[int], steps: int) -> tuple[float, ...]:
    """The values at probed steps (first and last among them), interpolated in the logarithm, with a mean of 1."""
    logs, filled = values.log(), []
    for step in range(steps):
        after = next(place for place, known in enumerate(probed) if known >= step)
        before = max(after - 1, 0)
        width = max(probed[after] - probed[before], 1)
        part = (step - probed[before]) / width if after != before else 0.0
        filled.append((1 - part) * logs[before] + part * logs[after])
    weights = torch.stack(filled).exp()
    return tuple(float(value) for value in weights / weights.mean())
