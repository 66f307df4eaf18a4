"""smooth: move the spread of activations into the weights, channel by channel, folded into the modulation and values. Exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.parts import Attention, InputGroup, LinearModulation
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.choose_codebook import check_codebook
from ditq.passes.folding import can_shift, fold_into_consumers, fold_into_feed, fold_into_values, plain_linear
from ditq.passes.judging import Judge, Trial, choose
from ditq.passes.rotation_kinds import DATA_FREE, KINDS, Making, multiply_adds
from ditq.passes.salience import SALIENCES, channel_sizes, still

PLAIN = 0.5  # the alpha that a search starts from
CERTAIN_GAIN = 0.01  # by how much of its error another pair must be better than the plain one


_SEARCHED = ("alpha", ("search",))


@register
@dataclass(frozen=True)
class Smooth(Pass):
    """Divide channel j of a linear's input by s_j, multiply the weight's column by it, and centre the channel.

        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        x' = x / s - mean(x / s)

    `alpha: search` tries pairs (alpha, beta) in s_j = max|x_j|^alpha / max|w_j|^beta for each input: beta = 1 - alpha and
    beta = 0 at `grid` steps, and no scaling. It takes the least quantized output error, rotated by `rotation`, on half of the
    sampled rows, if the other half confirms that it is better than alpha = 0.5.

    What attention hands to its output linears is scaled and centred the same way, folded into the value linears: `values`. All
    outputs of a joint attention share one s and one mean there, and alpha is 0.5 where it is searched elsewhere.

    Source: SmoothQuant (Xiao 2023, eq. 4); PTQ4DiT (Wu 2024, eq. 13 and 20) for the fold into adaLN and (eq. 8-11) for
    `salience: spearman`; HadaNorm (2025) for centring; the grid is SVDQuant's (Li 2024), of which AWQ's (Lin 2023) is the half
    with beta = 0. Only inputs whose norm and modulation feed nothing else are touched, and values that only attention reads,
    so nothing is added at run time.

    Example:
        - smooth: {alpha: 0.5, centre: true}
    """

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("smooth", "rotate", "quantize")
    alpha: float | str = setting(
        0.5, "how much of the spread moves to the weights: 0 none, 1 all; or search", words=("search",)
    )
    centre: bool = setting(True, "subtract each channel's calibrated mean, folded into shift and bias")
    values: bool = setting(True, "scale and centre what attention gives too, folded into the value linears")
    salience: str = setting("absmax", "what a channel's size is", SALIENCES)
    grid: int = setting(10, "steps of alpha from 0 to 1 in `alpha: search`", only=_SEARCHED)
    rotation: str = setting("block_hadamard", "the rotation that the search puts behind it", DATA_FREE, only=_SEARCHED)
    block: int = setting(64, "channels that a block Hadamard mixes there", only=_SEARCHED)
    format: str = setting("w4a8", "the format that the search judges by", only=_SEARCHED)
    codebook: str = setting("twin_log_shared", "the codebook that it judges by", only=_SEARCHED)
    rounding: str = setting("nearest", "the rounding that it judges by", ("nearest", "gptq"), only=_SEARCHED)
    select: list[str] = setting(["role:token"], "which linears; a group is smoothed if any of its linears matches")

    def check(self) -> None:
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise DitqError(f"pass 'smooth': alpha is {self.alpha}, must be between 0 and 1")
        if self.grid < 2:
            raise DitqError(f"pass 'smooth': grid is {self.grid}, must be 2 or more")
        if self.block < 2 or self.block & (self.block - 1):
            raise DitqError(f"pass 'smooth': block is {self.block}, must be a power of two from 2 on, such as 32 or 64")
        check_codebook("pass 'smooth'", self.codebook, self.format)

    def _groups(self, graph: DiTGraph) -> list[InputGroup]:
        selected = set(graph.select(self.select))
        return [group for group in graph.groups.values() if group.feed and selected & set(group.sites)]

    def _attentions(self, graph: DiTGraph) -> list[Attention]:
        selected = set(graph.select(self.select))
        return [
            attention
            for attention in graph.attentions.values()
            if self.values
            and attention.foldable
            and attention.plain
            and any(output.site in selected for output in attention.outputs)
        ]

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        what = "smooth+centre" if self.centre else "smooth"
        groups = self._groups(graph)
        for group in groups if self.alpha == "search" else []:
            try:
                multiply_adds(self.rotation, group.width, Making(self.block))
            except ValueError as error:
                raise DitqError(f"pass 'smooth': {group.name}: {error}; choose another rotation to judge by") from error
        said = {output.site: what for attention in self._attentions(graph) for output in attention.outputs}
        return said | {site: what for group in groups for site in group.sites}

    def folds_into(self, graph: DiTGraph) -> set[str]:
        feeds = (group.feed for group in self._groups(graph))
        found = {feed.site for feed in feeds if isinstance(feed, LinearModulation)}
        return found.union(*(attention.values for attention in self._attentions(graph)))

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        groups, attentions = self._groups(graph), self._attentions(graph)
        read = [graph.sites[output.site].group for attention in attentions for output in attention.outputs]
        for group in (*groups, *(graph.groups[name] for name in read)):
            _check_untouched(group, context)
        for attention in attentions:  # first: it changes what the weights that read the attention's own input are
            report.rows += self._smooth_values(graph, context, attention)
        for group in context.track(self.name, groups):
            report.rows.append(self._smooth(graph, context, group))
        report.summary = {"inputs folded": len(groups), "attentions folded": len(attentions)}
        return report

    def _smooth_values(self, graph: DiTGraph, context: Context, attention: Attention) -> list[dict[str, Any]]:
        """Fold one scale and mean a channel into the values, for all that reads the attention."""
        ranges = [
            (graph.groups[graph.sites[output.site].group], output.start, output.stop) for output in attention.outputs
        ]
        width = attention.heads * attention.head_width
        seen, mean = [], torch.zeros(width).double()
        moves = torch.zeros(width, dtype=torch.bool)
        for group, start, stop in ranges:
            statistics = context.statistics(group.name)
            seen.append((statistics, slice(start, stop)))
            mean += statistics.mean().double()[start:stop] / len(ranges) if self.centre else 0
        weight, size = torch.zeros(width).double(), torch.zeros(width).double()
        for (group, _, _), (statistics, part) in zip(ranges, seen, strict=True):
            largest = _largest([plain_linear(graph, site).weight for site in group.sites])
            centre = torch.zeros(group.width).double()
            centre[part] = mean
            weight = torch.maximum(weight, largest[part])
            size = torch.maximum(size, channel_sizes(self.salience, statistics, centre, largest)[part])
            moves |= ~still(statistics, centre)[part]
        alpha = PLAIN if isinstance(self.alpha, str) else self.alpha
        scale = _scale(size * moves, weight, alpha, 1 - alpha if alpha else 0.0)
        fold_into_values(graph, attention, 1 / scale, mean / scale)
        rows = []
        for (group, _, _), (statistics, part) in zip(ranges, seen, strict=True):
            inverse, shift = torch.ones(group.width).double(), torch.zeros(group.width).double()
            inverse[part], shift[part] = 1 / scale, mean / scale
            fold_into_consumers(graph, group.sites, inverse, shift)
            context.rescaled(group.name, inverse, shift, part)
            before, after = (_spread(one.absmax_all[part]) for one in (statistics, context.statistics(group.name)))
            rows.append(
                {"group": group.name, "sites": len(group.sites), "spread before": before, "spread after": after}
            )
        return rows

    def _smooth(self, graph: DiTGraph, context: Context, group: InputGroup) -> dict[str, Any]:
        assert group.feed is not None
        statistics = context.statistics(group.name)
        mean = (
            statistics.mean().double() if self.centre and can_shift(group.feed) else torch.zeros(group.width).double()
        )
        linears = [plain_linear(graph, site).weight for site in group.sites]
        weights = _largest(linears)
        size = channel_sizes(self.salience, statistics, mean, weights) * ~still(statistics, mean)
        row: dict[str, Any] = {"group": group.name, "sites": len(group.sites)}
        if isinstance(self.alpha, str):
            trial = Trial.of(statistics, list(linears))
            alpha, beta, errors = self._search(trial, size, weights, mean, context.seed)
            row |= {"alpha": alpha, "beta": beta, **errors}
        else:
            alpha, beta = self.alpha, 1 - self.alpha if self.alpha else 0.0
        scale = _scale(size, weights, alpha, beta)
        inverse, shift = 1 / scale, mean / scale
        fold_into_feed(graph, group.feed, inverse, shift)
        fold_into_consumers(graph, group.sites, inverse, shift)
        context.rescaled(group.name, inverse, shift, slice(None))
        after = context.statistics(group.name)
        return {**row, "spread before": _spread(statistics.absmax_all), "spread after": _spread(after.absmax_all)}

    def _search(
        self, trial: Trial, size: Tensor, weights: Tensor, mean: Tensor, seed: int
    ) -> tuple[float, float, dict[str, float]]:
        """(alpha, beta, held-out errors of the plain pair and of the best)."""
        tried, confirmed = trial.halves()
        judge = Judge(self.format, self.codebook, self.rounding)
        rotation = KINDS[self.rotation](torch.empty(0, len(size)), Making(self.block, seed=seed))

        def errors(on: Trial, pair: tuple[float, float]) -> Tensor:
            scale = _scale(size, weights, *pair)
            return judge.errors(on.scaled(1 / scale, mean / scale).rotated(rotation), on.output())

        plain = (PLAIN, 1 - PLAIN)
        best = min(_pairs(self.grid), key=lambda pair: float(errors(tried, pair).mean()))
        found = {"plain": errors(confirmed, plain), "best": errors(confirmed, best)}
        alpha, beta = best if choose(found, CERTAIN_GAIN) == "best" else plain
        return alpha, beta, {f"error {name}": float(value.mean()) for name, value in found.items()}


def _check_untouched(group: InputGroup, context: Context) -> None:
    change = context.change(group.name)
    if change.rotations or change.inverse_scale is not None:
        raise DitqError(f"pass 'smooth': {group.name} is rotated or smoothed already; put one smooth before rotate")


def _largest(weights: Sequence[Tensor]) -> Tensor:
    """float64 [C]: the largest magnitude in each column of the weights [O_i, C]."""
    return torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)


def _pairs(steps: int) -> Iterator[tuple[float, float]]:
    """(alpha, beta): none, the activations' spread alone, and both in balance."""
    yield 0.0, 0.0
    for i in range(1, steps):
        yield i / steps, 0.0
        yield i / steps, 1 - i / steps


def _scale(size: Tensor, weights: Tensor, alpha: float, beta: float) -> Tensor:
    """s [C] float64: size^alpha / weights^beta with a geometric mean of 1, since only ratios between channels matter.

    1 for a channel of size 0, which calibration saw at one value only: it says nothing of how far the channel goes elsewhere.
    """
    floor = torch.finfo(torch.float32).tiny ** 0.25
    moves = size > 0
    scale = size[moves].clamp_min(floor) ** alpha / weights[moves].clamp_min(floor) ** beta
    found = torch.ones_like(size)
    found[moves] = (scale / scale.log().mean().exp()).clamp(1e-4, 1e4)
    return found


def _spread(absmax: Tensor) -> float:
    """Largest channel over the median one."""
    return float(absmax.max() / absmax.median().clamp_min(1e-12))
