"""What a sampler makes of the denoiser's answers, found from recorded trajectories: a linear step, whatever the scheduler.

With x_s the latents that step s gets, f_sb the denoiser's answer in guidance branch b,

    x_{s+1} = alpha x_s + sum_b a_b f_sb  [ + beta x_{s-1} + sum_b c_b f_{s-1,b} ]

Euler and DDIM steps need the first terms, multistep solvers of second order (DPM-Solver++ 2M) those in brackets too;
guidance is in the a_b: u + g (c - u) has the weights g and 1 - g. Latents are as the denoiser gets them, so that a scheduler
may scale them. The coefficients are those of least squares over the entries of some trajectories, for each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditq.calibration.batches import joined, shapes_of
from ditq.calibration.record import Trajectories

LATENTS = "hidden_states"
LINEAR = 1e-3  # relative distance from the linear form at which a step counts as linear, recorded in float32
ROUNDED = 2.0  # and in epsilons of what it is recorded in: rounded latents and answers alone were 0.5 of one away


@dataclass(frozen=True)
class Step:
    """The coefficients of one step: of x_s, of x_{s-1}, of each branch's answer [B] at s and at s - 1."""

    latents: float
    latents_before: float
    answers: tuple[float, ...]
    answers_before: tuple[float, ...]

    def next(self, latents: Tensor, before: Tensor | None, answers: Tensor, answers_before: Tensor | None) -> Tensor:
        """x_{s+1} [k, ...] from x_s and x_{s-1} [k, ...] and the answers [k, B, ...] of both steps."""
        found = self.latents * latents + _combined(answers, self.answers)
        if before is not None and answers_before is not None:
            found = found + self.latents_before * before + _combined(answers_before, self.answers_before)
        return found


@dataclass(frozen=True)
class Sampler:
    """All steps but the last, whose result is not recorded; residual: how far the worst is from linear, relative."""

    steps: tuple[Step, ...]
    residual: float

    @property
    def branches(self) -> int:
        return len(self.steps[0].answers)

    def guidance(self) -> Tensor:
        """[T, B]: what guidance makes of the branches at each step, with a sum of 1; the last step as that before it."""
        weights = torch.tensor([step.answers for step in self.steps])
        weights = weights / weights.sum(1, keepdim=True)
        return torch.cat((weights, weights[-1:]))


@dataclass(frozen=True, eq=False)
class RecordedPath:
    """Recorded calls of some conditions, those of each step joined into one; rows of a condition are its branches.

    dtype: what latents and answers were rounded to when they were drawn, in whatever they are now.
    """

    calls: tuple[dict[str, Any], ...]
    conditions: int
    dtype: torch.dtype = torch.float32

    @property
    def branches(self) -> int:
        return self.calls[0][LATENTS].shape[0] // self.conditions

    def latents(self, step: int) -> Tensor:
        """x_s: [k, ...], the same in all branches."""
        return self.split(self.calls[step][LATENTS])[:, 0]

    def split(self, rows: Tensor) -> Tensor:
        """[k * B, ...] -> [k, B, ...]."""
        return rows.unflatten(0, (self.conditions, self.branches))

    def answers(self, output: Tensor) -> Tensor:
        """What the sampler takes of the denoiser's output [k * B, ...]: [k, B, ...], without a learned variance."""
        return self.split(without_variance(output, self.calls[0][LATENTS]))


def read_path(trajectories: Trajectories, conditions: Sequence[int]) -> RecordedPath | None:
    """The calls of these conditions, step after step; None where the calls of a step cannot be joined into one."""
    found: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
    places = enumerate(trajectories.places_of_calls())
    chosen = frozenset(number for number, (condition, _) in places if condition in conditions)
    for call in trajectories.calls(chosen=chosen):
        found.setdefault(call.step, {}).setdefault(call.condition, []).append(call.arguments)
    steps = []
    for step in range(trajectories.steps):
        calls = [arguments for condition in conditions for arguments in found.get(step, {}).get(condition, [])]
        shapes = [shapes_of(arguments) for arguments in calls]
        if not calls or any(shape != shapes[0] for shape in shapes) or LATENTS not in calls[0]:
            return None
        steps.append(joined(calls))
    rows = {step[LATENTS].shape for step in steps}
    return RecordedPath(tuple(steps), len(conditions), trajectories.dtype) if len(rows) == 1 else None


def find_sampler(model: nn.Module, trajectories: Trajectories) -> Sampler | None:
    """The sampler of these trajectories, from two of them; None where its steps are not linear in the answers of `model`."""
    path = read_path(trajectories, range(min(2, len(trajectories.conditions))))
    if path is None:
        return None
    with torch.no_grad():
        return fit_sampler(path, [answer(model, arguments) for arguments in path.calls])


def answer(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The denoiser's output for a call with these arguments."""
    output = model(**{**arguments, "return_dict": False})
    return output[0] if isinstance(output, tuple) else output


def without_variance(output: Tensor, latents: Tensor) -> Tensor:
    """The output less the half of its channels that is a learned variance, where it has twice as many as the latents."""
    channels = latents.shape[1]
    return output[:, :channels] if output.shape[1] == 2 * channels else output


def fit_sampler(path: RecordedPath, outputs: Sequence[Tensor]) -> Sampler | None:
    """The sampler that made the path; None where the latents are no linear function of the answers.

    outputs: the denoiser's output on each of the path's calls.
    """
    limit = max(LINEAR, ROUNDED * torch.finfo(path.dtype).eps)
    answers = [path.answers(output) for output in outputs]
    if any(given[:, 0].shape != path.latents(0).shape for given in answers):
        return None
    steps, worst = [], 0.0
    for number in range(len(path.calls) - 1):
        wanted = path.latents(number + 1)
        terms = [path.latents(number), *answers[number].unbind(1)]
        found, residual = _least_squares(terms, wanted)
        if residual > LINEAR and number:
            terms += [path.latents(number - 1), *answers[number - 1].unbind(1)]
            longer, left = _least_squares(terms, wanted)
            # Of what rounding alone leaves, further terms explain next to nothing, and coefficients of noise are no use.
            if left <= LINEAR or left**2 < residual**2 / 2:
                found, residual = longer, left
        found += [0.0] * (2 + 2 * path.branches - len(found))
        half = 1 + path.branches
        steps.append(Step(found[0], found[half], tuple(found[1:half]), tuple(found[half + 1 :])))
        worst = max(worst, residual)
    return Sampler(tuple(steps), worst) if steps and worst <= limit else None


def _least_squares(terms: Sequence[Tensor], wanted: Tensor) -> tuple[list[float], float]:
    """(coefficients, relative distance): wanted ~ sum of coefficient * term."""
    columns = torch.stack([term.double().flatten() for term in terms], dim=1)
    target = wanted.double().flatten()
    found = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    return found.tolist(), float((columns @ found - target).norm() / target.norm().clamp_min(1e-30))


def _combined(answers: Tensor, weights: Sequence[float]) -> Tensor:
    return torch.einsum("kb...,b->k...", answers, torch.tensor(weights, dtype=answers.dtype, device=answers.device))
