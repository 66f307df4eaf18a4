"""A training loop that can be stopped at any time and goes on as though it had not been."""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

SECONDS_BETWEEN_LINES = 30.0


class CheckpointError(Exception):
    """A checkpoint cannot be read, or belongs to a different training run."""


@dataclass(frozen=True)
class Plan:
    """What a run of the loop does, apart from the loss."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    checkpoint: Path
    steps_between_checkpoints: int
    warmup_steps: int = 100
    # The rate is held, then falls in the last part of the run: until then `steps` may still be changed on resuming.
    decay_fraction: float = 0.4
    weight_decay: float = 0.01
    average_decay: float = 0.999

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        decay_steps = max(1, round(self.steps * self.decay_fraction))
        left = min(1.0, (self.steps - step) / decay_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * 0.5 * (1 - math.cos(math.pi * left))

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of a step depend on nothing before it, so resuming needs no state of theirs."""
        return torch.Generator().manual_seed((self.seed << 32) + step)


@dataclass
class Progress:
    """How far a run is; the loss is a running mean over about the last hundred steps."""

    step: int = 0
    loss: float = 0.0

    def note(self, loss: float) -> None:
        self.step += 1
        self.loss += (loss - self.loss) / min(self.step, 100)


def train(model: nn.Module, loss_of: Callable[[torch.Generator], Tensor], plan: Plan, settings: dict[str, Any]) -> None:
    """Train to the end of the plan and leave the average of the weights in the model.

    `settings` is kept in the checkpoint: a run with others does not resume from it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    # The fused form does one pass over all weights, which counts where a step is a second or less.
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    progress = Progress()
    if plan.checkpoint.is_file():
        state = read_checkpoint(plan.checkpoint, settings)
        with torch.no_grad():
            copy_all(parameters, state["parameters"])
            copy_all(average, state["average"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(state["step"], state["loss"])
        click.echo(f"{plan.name}: going on from step {progress.step}")

    def save() -> None:
        write_checkpoint(
            plan.checkpoint,
            {
                "settings": settings,
                "step": progress.step,
                "loss": progress.loss,
                "parameters": [parameter.detach() for parameter in parameters],
                "average": average,
                "optimizer": optimizer.state_dict(),
            },
        )

    model.train()
    first_step, started = progress.step, time.monotonic()
    last_line = started - SECONDS_BETWEEN_LINES
    while progress.step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(progress.step)
        loss = loss_of(plan.generator(progress.step))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.note(loss.item())
        decay = min(plan.average_decay, progress.step / (progress.step + 10))
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter, 1 - decay)
        if progress.step % plan.steps_between_checkpoints == 0 or progress.step == plan.steps:
            save()
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES or progress.step == plan.steps:
            last_line = now
            click.echo(progress_line(plan, progress, (now - started) / (progress.step - first_step)))

    with torch.no_grad():
        copy_all(parameters, average)
    model.eval()


def progress_line(plan: Plan, progress: Progress, seconds_a_step: float) -> str:
    """One line: where the run is, how well it does, and when it will end."""
    left = round(seconds_a_step * (plan.steps - progress.step))
    return (
        f"{plan.name}: step {progress.step}/{plan.steps}, loss {progress.loss:.4f}, "
        f"{seconds_a_step:.2f} s a step, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors one by one; a list of another length is an error."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint as a whole, so that an interruption leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".fresh")
    with fresh.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain values; anything else in the file is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["settings"]
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    for key, value in settings.items():
        if found.get(key) != value:
            raise CheckpointError(f"{path} was made with {key} {found.get(key)}, not {value}: use another --out")
    return state
