"""smooth: move the spread of activations into the weights, channel by channel, folded into the modulation. Exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditq.calibration.statistics import InputStatistics
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.parts import InputGroup
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.folding import can_shift, fold_into_consumers, fold_into_feed, plain_linear


@register
@dataclass(frozen=True)
class Smooth(Pass):
    """Divide channel j of a linear's input by s_j, multiply the weight's column by it, and centre the channel.

        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        x' = x / s - mean(x / s)

    Source: SmoothQuant (Xiao 2023, eq. 4); PTQ4DiT (Wu 2024, eq. 13 and 20) for the fold into adaLN; HadaNorm (2025) for
    centring. Only inputs whose norm and modulation feed nothing else are touched, so nothing is added at run time.

    Example:
        - smooth: {alpha: 0.5, centre: true}
    """

    name: ClassVar[str] = "smooth"
    not_after: ClassVar[tuple[str, ...]] = ("smooth", "rotate", "quantize")
    alpha: float = setting(0.5, "how much of the spread moves to the weights: 0 none, 1 all")
    centre: bool = setting(True, "subtract each channel's calibrated mean, folded into shift and bias")
    salience: str = setting("absmax", "what a channel's size is", ("absmax", "rms"))
    select: list[str] = setting(["role:token"], "which linears; a group is smoothed if any of its linears matches")

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise DitqError(f"pass 'smooth': alpha is {self.alpha}, must be between 0 and 1")

    def _groups(self, graph: DiTGraph) -> list[InputGroup]:
        selected = set(graph.select(self.select))
        return [group for group in graph.groups.values() if group.feed and selected & set(group.sites)]

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        what = "smooth+centre" if self.centre else "smooth"
        return {site: what for group in self._groups(graph) for site in group.sites}

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        groups = self._groups(graph)
        for group in context.track(self.name, groups):
            report.rows.append(self._smooth(graph, context, group))
        report.summary = {"inputs folded": len(groups)}
        return report

    def _smooth(self, graph: DiTGraph, context: Context, group: InputGroup) -> dict[str, Any]:
        assert group.feed is not None
        change = context.change(group.name)
        if change.rotations or change.inverse_scale is not None:
            raise DitqError(f"pass 'smooth': {group.name} is rotated or smoothed already; put one smooth before rotate")
        statistics = context.statistics(group.name)
        mean = (
            statistics.mean().double() if self.centre and can_shift(group.feed) else torch.zeros(group.width).double()
        )
        size = self._size(statistics, mean)
        weights = torch.stack([plain_linear(graph, site).weight.double().abs().amax(0) for site in group.sites]).amax(0)
        floor = torch.finfo(torch.float32).tiny ** 0.25
        scale = size.clamp_min(floor) ** self.alpha / weights.clamp_min(floor) ** (1 - self.alpha)
        if self.alpha == 0:
            scale = torch.ones_like(scale)
        scale = (scale / scale.log().mean().exp()).clamp(1e-4, 1e4)  # only ratios between channels matter
        inverse, shift = 1 / scale, mean / scale
        fold_into_feed(graph, group.feed, inverse, shift)
        fold_into_consumers(graph, group.sites, inverse, shift)
        change.inverse_scale, change.shift = inverse.float(), shift.float()
        return {
            "group": group.name,
            "sites": len(group.sites),
            "spread before": _spread(statistics.absmax_all),
            "spread after": _spread(context.statistics(group.name).absmax_all),
        }

    def _size(self, statistics: InputStatistics, mean: Tensor) -> Tensor:
        if self.salience == "rms":
            return (statistics.channel_rms.double().square() - 2 * mean * statistics.mean().double() + mean**2).sqrt()
        if not self.centre:
            return statistics.absmax_all.double()
        return (statistics.sample.double() - mean).abs().amax(0)


def _spread(absmax: Tensor) -> float:
    """Largest channel over the median one."""
    return float(absmax.max() / absmax.median().clamp_min(1e-12))
