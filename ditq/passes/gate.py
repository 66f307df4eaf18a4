"""The quality gate of structural passes: the denoiser's error on held-out recorded calls, and a limit beyond which they refuse.

A structural pass declares `limit: float | str = limit_setting()` as its last setting and ends with
`return gated(report, graph, context, self.limit)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ditq.calibration.batches import CallBatch, held_out_conditions, sampled_batches
from ditq.calibration.record import Trajectories
from ditq.calibration.sampler import LATENTS, Sampler, find_sampler
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.passes.base import Context, PassReport, setting
from ditq.passes.block_records import tensors_of
from ditq.passes.guided_error import guidance_of, squared, told

SAMPLES = 128  # held-out samples, guidance branches among them, evenly from all steps
TOGETHER = 16  # of them in one call
LEAST = 1e-15  # relative errors that float32 cannot tell from none
ERROR = "error of the denoiser, dB"
KEPT = "held-out calls"  # in `Context.prepared`


def limit_setting() -> Any:
    """The setting `limit` of a structural pass, to be declared as `limit: float | str`."""
    return setting(
        "none",
        "largest error of the denoiser on held-out calls, in dB, that the pass may leave; beyond it it refuses",
        words=("none",),
        otherwise=0.0,
    )


@dataclass(frozen=True, eq=False)
class HeldOutCalls:
    """Recorded calls that nothing is learned from, with the original's answers.

    sampler: what joins guidance branches; None where that is not known. energy: sum of the squared answers, joined.
    """

    batches: list[CallBatch]
    wanted: list[list[Tensor]]
    sampler: Sampler | None
    energy: float

    @classmethod
    def of(cls, original: nn.Module, trajectories: Trajectories, seed: int = 0) -> HeldOutCalls:
        """About `SAMPLES` samples of the held-out conditions; of a recording with one condition, of that one."""
        sampler = find_sampler(original, trajectories)
        conditions = held_out_conditions(trajectories) or None
        return cls.judging(original, sampled_batches(trajectories, SAMPLES, TOGETHER, seed, conditions), sampler)

    @classmethod
    def judging(cls, original: nn.Module, batches: list[CallBatch], sampler: Sampler | None) -> HeldOutCalls:
        """Given calls, for a choice that the held-out ones must not shape."""
        wanted = [answers(original, batch) for batch in batches]
        energy = sum(_counted(given, batch, sampler) for given, batch in zip(wanted, batches, strict=True))
        return cls(batches, wanted, sampler, energy)

    def error(self, model: nn.Module) -> float:
        """||f - f_T||^2 / ||f_T||^2 of the model's answers f against the original's f_T, of branches as guidance joins them."""
        lost = 0.0
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            difference = [a - b for a, b in zip(answers(model, batch), wanted, strict=True)]
            lost += _counted(difference, batch, self.sampler)
        return lost / max(self.energy, torch.finfo(torch.float64).tiny)

    def errors(self, model: nn.Module, bin_of_step: Tensor, bins: int) -> Tensor:
        """`error` divided among bins of the scheduler's steps, int64 [T]: float64 [bins], whose sum it is."""
        lost = torch.zeros(bins, dtype=torch.float64)
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            difference = [a - b for a, b in zip(answers(model, batch), wanted, strict=True)]
            places = bin_of_step[batch.steps]
            for number in places.unique().tolist():
                lost[number] += _counted(difference, batch, self.sampler, (places == number).float())
        return lost / max(self.energy, torch.finfo(torch.float64).tiny)


@torch.no_grad()
def answers(model: nn.Module, batch: CallBatch) -> list[Tensor]:
    """What the model gives for a batch of calls, computed where its parameters are, on the CPU."""
    device = next(model.parameters()).device
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch.arguments)
    return [tensor.cpu() for tensor in tensors_of(model(**{**arguments, "return_dict": False}))]


def _counted(tensors: list[Tensor], batch: CallBatch, sampler: Sampler | None, weights: Tensor | None = None) -> float:
    """Squared, over the samples of the batch, each with its weight."""
    latents = batch.arguments.get(LATENTS)
    weights = torch.ones(len(batch.steps)) if weights is None else weights
    return float(squared(tensors, weights, guidance_of(batch, sampler), latents, alone=0.0))


def decibels(error: float) -> float:
    """A relative squared error in dB: 0 is as large as the answers themselves, -150 what float32 cannot tell from none."""
    return 10 * math.log10(max(error, LEAST))


def held_out_calls(context: Context) -> HeldOutCalls | None:
    """The calls that judge all structural passes of a compile, found once; None where no calls were recorded."""
    if context.original is None or not context.has_trajectories:
        return None
    if KEPT not in context.prepared:
        context.prepared[KEPT] = HeldOutCalls.of(context.original, context.trajectories(), context.seed)
    found: HeldOutCalls = context.prepared[KEPT]
    return found


def gated(report: PassReport, graph: DiTGraph, context: Context, limit: float | str = "none") -> PassReport:
    """The pass's report with the denoiser's error after it, against the model before the first structural pass.

    Raises:
        DitqError: the error is above `limit`, or not a number; or there is a limit and nothing to measure on.
    """
    held_out = held_out_calls(context)
    if held_out is None:
        if limit != "none":
            raise DitqError(
                f"pass '{report.name}': a limit needs recorded calls to measure on; give the statistics as a folder of "
                "`ditq calibrate`"
            )
        report.summary[ERROR] = "not measured, no recorded calls"
        return report
    error = held_out.error(graph.model)
    if not math.isfinite(error):
        raise DitqError(
            f"pass '{report.name}': the model that it leaves gives values that are not finite; change less of it"
        )
    level = decibels(error)
    report.summary |= {ERROR: level, "branches joined as": told(held_out.sampler)}
    if not isinstance(limit, str) and level > limit:
        raise DitqError(
            f"pass '{report.name}': the denoiser's error on held-out calls is {level:.1f} dB, above the limit of {limit:g} dB; "
            "change less of the model, train it longer with 'distill', or give a higher limit"
        )
    return report
