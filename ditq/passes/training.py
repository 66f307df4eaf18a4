"""Training of some parameters of a model: Adam, warm-up and decay, running means of the weights, checkpoints, interruption.

Every step depends on nothing but what a checkpoint holds and its number, so a resumed run gives the same bits.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.passes.base import Context

BETAS = (0.9, 0.99)
Losses = Callable[[nn.Module, int], dict[str, Tensor]]
"""(the module, wrapped for all processes; number of the batch) -> `total`, which is descended, and what is written down."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast. rate: at its highest; ema: decay of the running mean of the weights, less in the first steps."""

    steps: int
    rate: float
    warmup: int
    decay: str
    weight_decay: float
    clip: float
    ema: float
    accumulate: int
    save_every: int

    def rate_at(self, step: int) -> float:
        """Linear warm-up; then half a cosine down to 0, or constant."""
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay == "cosine" else 1.0
        return self.rate * min(1.0, (step + 1) / max(self.warmup, 1)) * falling

    def ema_at(self, step: int) -> float:
        """min(ema, (1 + t) / (10 + t)): the mean forgets the start of a short training too."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass
class Progress:
    """Where a training is: steps done, the running means of the weights, Adam's moments, the losses of each step."""

    step: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)
    curves: list[dict[str, float]] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0  # of a step, in this run


class Training:
    """Trains `parameters` of `module` on all processes of `accelerator` alike; only the first one writes.

    Args:
        name: of its checkpoint, in the context's cache of finished parts.
        module: what `losses` runs; wrapped by the accelerator.
        parameters: by name, float32; the only ones that change.
    """

    def __init__(
        self, name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter], plan: Plan, accelerator: Any
    ) -> None:
        for key, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise DitqError(f"{key}: is {parameter.dtype}, but only float32 weights are trained; load the model so")
        self.name, self.parameters, self.plan = name, dict(parameters), plan
        self.accelerator = accelerator
        decayed = [p for p in parameters.values() if p.dim() > 1]
        others = [p for p in parameters.values() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=plan.rate, betas=BETAS)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self.module, self._optimizer = accelerator.prepare(module, self._adam)
        self.progress = Progress()

    def run(
        self, losses: Losses, context: Context, judge: Callable[[], float] | None = None, points: int = 0
    ) -> Progress:
        """Train to the end, from a checkpoint where there is one, and leave the running means as the weights.

        judge: called with the running means in place, on the first process, at about `points` steps.
        """
        self._resume(context)
        progress, plan = self.progress, self.plan
        every = -(-plan.steps // points) if points else 0
        left, spent = range(plan.steps - progress.step), 0.0
        with _ctrl_c_after_a_step() as asked:
            for _ in context.track(self.name, left):
                started = time.perf_counter()
                progress.curves.append(self._step(losses))
                progress.step += 1
                spent += time.perf_counter() - started
                if judge is not None and every and progress.step % every == 0 and progress.step < plan.steps:
                    with self.averaged():
                        if self.accelerator.is_main_process:
                            progress.judged.append((progress.step, judge()))
                if asked() or progress.step % plan.save_every == 0 or progress.step == plan.steps:
                    self._save(context)
                if asked():
                    raise KeyboardInterrupt
        self.take(progress.average)
        progress.seconds = spent / max(len(left), 1)
        return progress

    def _step(self, losses: Losses) -> dict[str, float]:
        progress, plan = self.progress, self.plan
        for group in self._adam.param_groups:
            group["lr"] = plan.rate_at(progress.step)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        told: dict[str, float] = {}
        for part in range(plan.accumulate):
            number = ((progress.step * plan.accumulate) + part) * processes + rank
            last = part == plan.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                found = losses(self.module, number)
                self.accelerator.backward(found["total"] / plan.accumulate)
            values = torch.stack(
                [value.detach().float() for value in found.values()]
            ).tolist()  # one wait for the device
            for key, value in zip(found, values, strict=True):
                told[key] = told.get(key, 0.0) + value / plan.accumulate
        if not math.isfinite(told["total"]):
            raise DitqError(
                f"{self.name}: the loss of step {progress.step + 1} is no number; give a lower rate, or clip less"
            )
        if plan.clip:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), plan.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        keep = plan.ema_at(progress.step)
        with torch.no_grad():
            averages = [progress.average[key] for key in self.parameters]
            torch._foreach_lerp_(averages, list(self.parameters.values()), 1 - keep)
        return told

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running means in place of the weights while the block runs."""
        present = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        self.take(self.progress.average)
        try:
            yield
        finally:
            self.take(present)

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor]) -> None:
        """Give the parameters these values."""
        for key, parameter in self.parameters.items():
            parameter.copy_(values[key])

    def _save(self, context: Context) -> None:
        if context.site_cache is None or not self.accelerator.is_main_process:
            return
        progress = self.progress
        tensors = {"step": torch.tensor(progress.step)}
        for key, parameter in self.parameters.items():
            tensors[f"weight/{key}"] = parameter.detach().cpu()
            tensors[f"average/{key}"] = progress.average[key].cpu()
            for moment, value in self._adam.state.get(parameter, {}).items():
                tensors[f"{moment}/{key}"] = torch.as_tensor(value).cpu()
        for key in progress.curves[0]:
            tensors[f"curve/{key}"] = torch.tensor([told[key] for told in progress.curves], dtype=torch.float64)
        tensors["judged"] = torch.tensor(progress.judged, dtype=torch.float64)
        context.site_cache.put_tensors(self.name, tensors)

    def _resume(self, context: Context) -> None:
        """Take up the first process's checkpoint, on every process."""
        found = context.site_cache.get_tensors(self.name) if context.site_cache is not None else None
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            found = broadcast_object_list([found])[0]
        progress = self.progress
        if found is None:
            progress.average = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
            return
        progress.step = int(found["step"])
        self.take({key: found[f"weight/{key}"] for key in self.parameters})
        for key, parameter in self.parameters.items():
            progress.average[key] = found[f"average/{key}"].to(parameter.device)
            names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in found]
            for name in names:
                value = found[f"{name}/{key}"]
                self._adam.state[parameter][name] = value if name == "step" else value.to(parameter.device)
        curves = {key.removeprefix("curve/"): value for key, value in found.items() if key.startswith("curve/")}
        progress.curves = [
            {key: float(values[step]) for key, values in curves.items()} for step in range(progress.step)
        ]
        progress.judged = [(int(step), float(error)) for step, error in found["judged"].reshape(-1, 2)]


@contextmanager
def _ctrl_c_after_a_step() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is only noted while the block runs, for a step to be finished; a second one interrupts at once."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
