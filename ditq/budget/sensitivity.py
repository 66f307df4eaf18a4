"""What each candidate of each linear costs in the denoiser's output, on calls recorded along real trajectories.

Weight errors mislead here, and so do layer errors: an error counts by what it does to the output. To first order an error
dY of one linear's output changes the denoiser's output f by J dY, with J the derivative of f. For random signs v

    E_v (v^T J dY)^2 = |J dY|^2        v^T J dY = <g, dY>,   g = d(v^T f) / dY

so one backward pass gives g for all linears at once, and each candidate costs one evaluation of its layer alone. dY is what
the quantized layer really gives less what the linear gives, so rounded inputs and corrected biases count too. Errors of
different linears are taken to add up in the square; `assignment` says how far they do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ditq.budget.choices import Choices, answer_of
from ditq.budget.taps import Tap, tapped
from ditq.calibration.record import Trajectories
from ditq.calibration.sampler import answer
from ditq.calibration.statistics import Statistics
from ditq.graph import DiTGraph
from ditq.progress import ProgressSetting, progress_bar

CALLS = 48
PROBES = 4


class Call(NamedTuple):
    """Arguments of one recorded call, and how often it was drawn."""

    arguments: Mapping[str, Any]
    times: int = 1


def step_lengths(timesteps: Sequence[float]) -> list[float]:
    """Squares of the scheduler's steps: what an error of the denoiser adds to the latents at that step, if nothing of it is
    made larger or smaller later on. The last step goes to 0.
    """
    ends = [*timesteps[1:], 0.0]
    return [(start - end) ** 2 for start, end in zip(timesteps, ends, strict=True)]


def weights_of_steps(statistics: Statistics, trajectories: Trajectories) -> list[float]:
    """What an error of the denoiser's output is worth at each step: as calibration measured it, else by the steps' lengths."""
    found = statistics.step_weights
    if found is not None and len(found.effect) == trajectories.steps:
        return list(found.effect)
    return step_lengths(trajectories.timesteps)


def chosen_calls(trajectories: Trajectories, weights: Sequence[float], count: int = CALLS, seed: int = 0) -> list[Call]:
    """`count` recorded calls, drawn in proportion to the weight of their step, so that each counts alike.

    weights: for each step, how much a squared error of the denoiser there counts in the final latent. Systematic sampling
    over the calls in the order of their steps; within a step at random.
    """
    steps = np.array(trajectories.steps_of_calls())
    chances = np.asarray(weights, dtype=np.float64)[steps]
    generator = np.random.default_rng(seed)
    order = np.lexsort((generator.random(len(steps)), steps))
    ends = np.cumsum(chances[order]) / chances.sum()
    places = (np.arange(count) + generator.random()) / count
    drawn = order[np.minimum(np.searchsorted(ends, places), len(order) - 1)]
    counts = Counter(drawn.tolist())
    read = trajectories.calls(chosen=frozenset(counts))
    return [Call(call.arguments, counts[number]) for number, call in zip(sorted(counts), read, strict=True)]


@dataclass(frozen=True, eq=False)
class SingleCalls:
    """Costs in the denoiser's output on recorded calls, each for itself.

    clean: the output of the model in full precision for each call.
    """

    calls: Sequence[Call]
    clean: Sequence[Tensor]
    unit: ClassVar[str] = "the denoiser's output"
    adds_up: ClassVar[bool] = False

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, trajectories: Trajectories, statistics: Statistics, seed: int = 0) -> SingleCalls:
        """On `CALLS` of the recorded calls. model: in full precision."""
        calls = chosen_calls(trajectories, weights_of_steps(statistics, trajectories), seed=seed)
        return cls(calls, [answer(model, call.arguments) for call in calls])

    def candidates(
        self, graph: DiTGraph, choices: Choices, probes: int = PROBES, seed: int = 0, progress: ProgressSetting = None
    ) -> NDArray[np.float64]:
        """[N, F]: relative squared error of the denoiser's output that each candidate of each linear causes alone.

        Args:
            graph: the model in full precision, after the passes before `quantize`.
            probes: random directions v a call. The estimate of one entry has a relative standard error of about
                sqrt(2 / (calls * probes)); the same directions serve all candidates of a linear, whose order it hardly blurs.
        """
        errors = torch.zeros(len(choices.sites), len(choices.names), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        modules = [graph.linear(site) for site in choices.sites]
        with progress_bar("sensitivity", len(self.calls), progress) as bar:
            for call in self.calls:
                with tapped(modules) as taps, torch.enable_grad():
                    output = answer(graph.model, call.arguments)
                choices.tell_timestep(call.arguments)
                reached = [row for row, tap in enumerate(taps) if tap.zero is not None]
                zeros = [zero for row in reached if (zero := taps[row].zero) is not None]
                slopes = []
                for probe in range(probes):
                    signs = torch.randint(0, 2, output.shape, generator=generator).to(output.dtype) * 2 - 1
                    more = probe + 1 < probes
                    slopes.append(torch.autograd.grad(output, zeros, signs, retain_graph=more, allow_unused=True))
                with torch.no_grad():
                    for place, row in enumerate(reached):
                        given = [slope[place] for slope in slopes]
                        if given[0] is not None:
                            errors[row] += call.times * _caused(taps[row], choices.layers[row], torch.stack(given))
                bar.advance()
        return (errors / probes / max(self._energy(), 1e-300)).numpy()

    @torch.no_grad()
    def assignment(self, graph: DiTGraph, choices: Choices, choice: NDArray[np.int64]) -> float:
        """Relative squared error of the denoiser's output with that choice [N] in place."""
        with choices.placed(graph, choice):
            outputs = [answer(graph.model, call.arguments) for call in self.calls]
        lost = zip(self.calls, outputs, self.clean, strict=True)
        error = sum(call.times * float((a - b).double().square().sum()) for call, a, b in lost)
        return error / max(self._energy(), 1e-300)

    def _energy(self) -> float:
        pairs = zip(self.calls, self.clean, strict=True)
        return sum(call.times * float(wanted.double().square().sum()) for call, wanted in pairs)


def _caused(tap: Tap, layers: Sequence[nn.Module], slopes: Tensor) -> Tensor:
    """float64 [F]: sum over the probes of <g, dY>^2 for each candidate; slopes [probes, ...] are the g."""
    assert tap.given is not None and tap.made is not None
    flat = slopes.flatten(1).double()
    lost = ((answer_of(layer, tap.given) - tap.made).flatten().double() for layer in layers)
    return torch.stack([(flat @ each).square().sum() for each in lost])
