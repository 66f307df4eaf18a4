"""What each candidate of each linear costs in the latents at the end of a trajectory, errors of all its steps together.

The error of a coded weight is much the same at every step and in both guidance branches: some of it adds up along the
trajectory, some cancels in u + g (c - u). The error of single calls (sensitivity.py) sees neither. To first order, the errors
dY_sb of a linear's output in all calls of a trajectory change the last latents x by

    <v, dx> = sum_sb <g_sb, dY_sb>        E_v <v, dx>^2 = |dx|^2     (random signs v)

where g is found by going back through the steps of the sampler (sampler.py), as reverse accumulation or the adjoint method
of discrete optimal control does (Bryson and Ho, Applied Optimal Control, 1975, 2.2): with l_s the derivative of <v, x> by x_s,

    h_sb = a_b l_{s+1} + c_b l_{s+2}                        derivative by the answer f_sb
    g_sb = h_sb df_sb/dY_sb                                 one backward pass for all linears
    l_s  = alpha l_{s+1} + beta l_{s+2} + sum_b h_sb df_sb/dx_s

The last latents are those that the last step gets: its result is not recorded.

A trajectory may react to the same errors a hundred times as much as another. Means are over the logarithms, as the mean
of a PSNR is: with e_p what a candidate costs in trajectory p and E_p what all linears cost there (a geometric mean over
the candidates), its cost is

    mean_p(e_p / E_p) * exp(mean_p log E_p)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ditq.budget.choices import Choices, answer_of
from ditq.budget.taps import Tap, tapped
from ditq.calibration.prompts import spread
from ditq.calibration.record import Trajectories
from ditq.calibration.sampler import LATENTS, RecordedPath, Sampler, answer, find_sampler, read_path
from ditq.graph import DiTGraph
from ditq.progress import ProgressSetting, progress_bar

CONDITIONS = 8
JUDGES = 8  # conditions that are drawn to see what an assignment really costs
TOGETHER = 4  # conditions in one backward pass
JUDGED = -(-JUDGES // TOGETHER)  # paths that those conditions take
PROBES = 4


@dataclass(frozen=True, eq=False)
class AlongTrajectories:
    """Costs in the latents that the last step gets, on trajectories that can be gone through again.

    Attributes:
        paths: recorded calls of `TOGETHER` conditions each.
        sampler: the steps between them.
        ends: for each path the last latents [k, ...] without any error; None where those recorded are.
    """

    paths: tuple[RecordedPath, ...]
    sampler: Sampler
    ends: tuple[Tensor, ...] | None = None
    unit: ClassVar[str] = "the last latents"
    adds_up: ClassVar[bool] = True

    @classmethod
    def of(
        cls, model: nn.Module, trajectories: Trajectories, recorded: nn.Module | None = None
    ) -> AlongTrajectories | None:
        """On at most `CONDITIONS` conditions; None where the sampler makes no linear steps of what was recorded.

        Args:
            model: whose linears are to be quantized.
            recorded: the model that the trajectories were recorded with, where `model` computes something else.
        """
        chosen = list(spread(range(len(trajectories.conditions)), CONDITIONS))
        parts = [chosen[start : start + TOGETHER] for start in range(0, len(chosen), TOGETHER)]
        paths = [read_path(trajectories, part) for part in parts]
        found = tuple(path for path in paths if path is not None)
        if len(found) < len(paths):
            return None
        sampler = find_sampler(model if recorded is None else recorded, trajectories)
        if sampler is None:
            return None
        cost = cls(found, sampler)
        if recorded is None and trajectories.dtype.itemsize >= torch.float32.itemsize:
            return cost
        # What was recorded in bfloat16 ends 1 % away from what a model in float32 draws: as far as w8 would.
        return replace(cost, ends=tuple(cost._drawn(model, path) for path in found[:JUDGED]))

    def candidates(
        self, graph: DiTGraph, choices: Choices, probes: int = PROBES, seed: int = 0, progress: ProgressSetting = None
    ) -> NDArray[np.float64]:
        """[N, F]: relative squared error of the last latents that each candidate of each linear causes alone, to first order,
        as trajectories have it in the mean of their logarithms.

        Args:
            graph: the model in full precision, after the passes before `quantize`.
            probes: random directions v a condition. One entry has a relative standard error of about
                sqrt(2 / (conditions * probes)). The same directions serve all candidates of a linear, so it hardly blurs
                their order.
        """
        generator = torch.Generator().manual_seed(seed)
        found = []
        with progress_bar("sensitivity", sum(len(path.calls) - 1 for path in self.paths), progress) as bar:
            for path in self.paths:
                last = path.latents(len(path.calls) - 1)
                signs = torch.randint(0, 2, (probes, *last.shape), generator=generator) * 2 - 1
                walk = _Walk(graph, choices, path, self.sampler, signs.to(last.dtype))
                for step in reversed(range(len(path.calls) - 1)):
                    walk.back(step)
                    bar.advance()
                found.append(walk.changes.square().mean(2) / _energies(last))
        return _typical(torch.cat(found, dim=2)).numpy()

    def assignment(self, graph: DiTGraph, choices: Choices, choice: NDArray[np.int64]) -> float:
        """Relative squared error of the last latents with that choice [N], see `drawn`."""
        with choices.placed(graph, choice):
            return self.drawn(graph.model)

    def drawn(self, model: nn.Module) -> float:
        """Relative squared error of the last latents when `model` draws from the same noise: the geometric mean over at
        least `JUDGES` trajectories; 0 where none of them differs.
        """
        errors = []
        for number, path in enumerate(self.paths[:JUDGED]):
            wanted = path.latents(len(path.calls) - 1) if self.ends is None else self.ends[number]
            errors.append(_energies(self._drawn(model, path) - wanted) / _energies(wanted))
        found = torch.cat(errors)
        return float(found.clamp_min(1e-300).log().mean().exp()) if found.any() else 0.0

    @torch.no_grad()
    def _drawn(self, model: nn.Module, path: RecordedPath) -> Tensor:
        latents, before, answers_before = path.latents(0), None, None
        for step, arguments in zip(
            self.sampler.steps, path.calls, strict=False
        ):  # no step is known after the last call
            rows = latents.repeat_interleave(path.branches, 0)
            answers = path.answers(answer(model, {**arguments, LATENTS: rows}))
            latents, before, answers_before = step.next(latents, before, answers, answers_before), latents, answers
        return latents


class _Walk:
    """One path gone through from its end to its start.

    changes: float64 [N, F, V, k], <v, dx> of each candidate, direction and condition, of the steps so far.
    """

    def __init__(self, graph: DiTGraph, choices: Choices, path: RecordedPath, sampler: Sampler, signs: Tensor) -> None:
        self.graph, self.choices, self.path, self.sampler = graph, choices, path, sampler
        self.modules = [graph.linear(site) for site in choices.sites]
        self.slope, self.slope_after = signs, torch.zeros_like(signs)
        shape = (len(choices.sites), len(choices.names), len(signs), path.conditions)
        self.changes = torch.zeros(shape, dtype=torch.float64)

    def back(self, step: int) -> None:
        """From l_{s+1} and l_{s+2} to l_s; adds what the errors of this step's calls change."""
        path, coefficients = self.path, self.sampler.steps[step]
        given = path.calls[step][LATENTS].detach().clone().requires_grad_()
        with tapped(self.modules) as taps, torch.enable_grad():
            output = answer(self.graph.model, {**path.calls[step], LATENTS: given})
            answers = path.answers(output)
        self.choices.tell_timestep(path.calls[step])
        after = self.sampler.steps[step + 1] if step + 1 < len(self.sampler.steps) else None
        reached = [row for row, tap in enumerate(taps) if tap.zero is not None]
        zeros = [zero for row in reached if (zero := taps[row].zero) is not None]
        slopes: list[list[Tensor | None]] = [[] for _ in zeros]
        back = []
        for probe, (slope, slope_after) in enumerate(zip(self.slope, self.slope_after, strict=True)):
            by_answer = _spread(slope, coefficients.answers)
            if after is not None:
                by_answer = by_answer + _spread(slope_after, after.answers_before)
            found = torch.autograd.grad(
                answers, [*zeros, given], by_answer, retain_graph=probe + 1 < len(self.slope), allow_unused=True
            )
            for place, value in enumerate(found[:-1]):
                slopes[place].append(value)
            by_latents = path.split(found[-1]).sum(1)
            back.append(
                coefficients.latents * slope + (0 if after is None else after.latents_before * slope_after) + by_latents
            )
        self.slope, self.slope_after = torch.stack(back), self.slope
        with torch.no_grad():
            for place, row in enumerate(reached):
                known = [value for value in slopes[place] if value is not None]
                if known:
                    self.changes[row] += self._caused(row, taps[row], torch.stack(known))

    def _caused(self, row: int, tap: Tap, slopes: Tensor) -> Tensor:
        """float64 [F, V, k]: <g, dY> summed over the branches; slopes [V, k * B, ...]."""
        assert tap.given is not None and tap.made is not None
        count = self.path.conditions
        flat = slopes.reshape(len(slopes), count, -1).double()
        found: dict[int, Tensor] = {}  # a layer that stands for several candidates is run once
        for layer in self.choices.layers[row]:
            if id(layer) not in found:
                lost = (answer_of(layer, tap.given) - tap.made).reshape(count, -1).double()
                found[id(layer)] = torch.einsum("vke,ke->vk", flat, lost)
        return torch.stack([found[id(layer)] for layer in self.choices.layers[row]])


def _spread(slope: Tensor, weights: Sequence[float]) -> Tensor:
    """[k, ...] -> [k, B, ...]: the slope by each branch's answer."""
    return torch.stack([weight * slope for weight in weights], dim=1)


def _energies(latents: Tensor) -> Tensor:
    """Sum of squares of each sample [k, ...]: float64 [k]."""
    return latents.double().flatten(1).square().sum(1)


def _typical(errors: Tensor) -> Tensor:
    """[N, F, P] of single trajectories -> [N, F], see the head of this file."""
    totals = errors.sum(0).clamp_min(1e-300).log().mean(0)
    return (errors / totals.exp()).mean(2) * totals.mean().exp()
