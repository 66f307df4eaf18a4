"""How the tokens of whole samples spread over the experts: by expert, by step, by place in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditq.calibration.batches import CallBatch
from ditq.nn.structural.experts import MixtureOfExperts
from ditq.numerics.routing import FINENESS, slots_of
from ditq.passes.base import Context
from ditq.passes.block_records import call

BINS = 4  # of the steps
SPARED = 0.02  # share of the answers that may find no slot
PLACES = 4096  # tokens of a sample up to which places are told apart


def summary_of(loads: Mapping[str, Load]) -> dict[str, Any]:
    """The extremes over all mixtures, for a report; nothing where there are none."""
    if not loads:
        return {}
    least, most = (
        min(float(load.share.min()) for load in loads.values()),
        max(float(load.share.max()) for load in loads.values()),
    )
    return {
        "least and most of the tokens an expert gets": [least, most],
        "answers that found no slot": max(load.dropped for load in loads.values()),
    }


@dataclass
class Load:
    """Shares of the tokens that each expert answers: `share` [E], by bin of steps [bins, E], by place [E, N]; `dropped` is the
    share of the answers asked for that found no slot; `capacity` the least at which no more than SPARED of these answers would
    find none.
    """

    share: Tensor
    by_step: Tensor
    by_place: Tensor
    dropped: float
    capacity: float

    def row(self) -> dict[str, Any]:
        """For the report."""
        places = self.by_place if self.by_place.shape[1] <= PLACES else self.by_place[:, :0]
        return {
            "least load": float(self.share.min()),
            "most load": float(self.share.max()),
            "dropped": self.dropped,
            "load": [round(float(x), 4) for x in self.share],
            "load by step": [[round(float(x), 4) for x in row] for row in self.by_step],
            "load by place": [[round(float(x), 3) for x in row] for row in places],
        }


def measure_load(model: nn.Module, batches: Sequence[CallBatch], context: Context) -> dict[str, Load]:
    """The load of each mixture of the model, by place, over the calls; nothing of one in a block that no call runs."""
    mixtures = {name: part for name, part in model.named_modules() if isinstance(part, MixtureOfExperts)}
    answers: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in mixtures}
    steps = 1 + max((int(batch.steps.max()) for batch in batches), default=0)
    try:
        for part in mixtures.values():
            part.chosen = []
        with torch.no_grad():
            for batch in context.track("load of experts", batches if mixtures else []):
                call(model, batch)
                for name, part in mixtures.items():
                    if part.chosen:  # a block that runs at some timesteps only may have none of this batch's
                        answers[name].append((part.chosen.pop().cpu(), batch.steps * BINS // steps))
    finally:
        for part in mixtures.values():
            part.chosen = None
    return {name: _load(answers[name], part.top) for name, part in mixtures.items() if answers[name]}


def _load(answers: list[tuple[Tensor, Tensor]], top: int) -> Load:
    """Of who answers whom, bool [B, E, N], and the bin of each sample's step [B]."""
    tokens = min(chosen.shape[2] for chosen, _ in answers)
    chosen = torch.cat([chosen[:, :, :tokens] for chosen, _ in answers]).float()
    bins = torch.cat([place for _, place in answers])
    mean = chosen.mean(dim=(0, 2))
    by_step = torch.stack([chosen[bins == number].mean(dim=(0, 2)).nan_to_num() for number in range(BINS)])
    return Load(mean, by_step, chosen.mean(dim=0), max(0.0, 1 - float(mean.sum()) / top), _capacity(chosen, top))


def _capacity(chosen: Tensor, top: int) -> float:
    """By who answers whom [B, E, N]: of 1, 1.125 and so on."""
    counts, (_, experts, tokens) = chosen.sum(dim=2), chosen.shape
    most = experts * FINENESS // top
    for capacity in range(FINENESS, most, FINENESS // 8):
        beyond = (counts - slots_of(tokens, experts, top, capacity)).clamp_min(0).sum()
        if float(beyond) <= SPARED * float(counts.sum()):
            return capacity / FINENESS
    return most / FINENESS
