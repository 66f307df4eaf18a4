"""slim_modulation: modulation linears as two thin ones, since what they give varies in few directions only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ditq.calibration.batches import held_out_conditions, sampled_batches, teaching_conditions
from ditq.calibration.further import FurtherConditions
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural.low_rank_linear import LowRankLinear
from ditq.numerics.principal_outputs import principal_outputs, rank_for
from ditq.parts import LinearSite, Work
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.block_records import call
from ditq.passes.folding import plain_linear
from ditq.passes.gate import gated, limit_setting

UNSEEN = 1e-8  # variance of every channel besides what calibration saw, as a share of the mean: decides where that says nothing
CONSTANT = 1e-12  # variance of an input as a share of its mean square up to which nothing is known of how it varies


@register
@dataclass(frozen=True)
class SlimModulation(Pass):
    """W x + b becomes U (U^T W) x + b', U [O, r] the directions in which the modulation varies most over the calibration.

        y - E y = W (x - E x)        W' = U_r U_r^T W        b' = b + (W - W') E x

    U_r holds the r leading principal directions of the output, so that the variance of what is lost is least (Eckart-Young,
    weighted with the covariance of the input), and the mean is exact. Modulation is made of time and pooled text alone and is a
    large share of the parameters where each block has its own (27 % of FLUX's), of which few directions are ever used.

    The rank of each linear is the least that keeps `keep` of the variance, or `rank`, rounded up to a multiple of
    `multiple`; a linear that would not become smaller stays, and so does one whose input never varied. Both linears are
    quantized like others of the role `modulation`.

    Source: that modulation can be shared or thinned is Dense2MoE's observation (arXiv 2510.09094).

    Example:
        - slim_modulation: {keep: 0.9999}
    """

    name: ClassVar[str] = "slim_modulation"
    structural: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("slim_modulation",)
    keep: float = setting(0.9999, "share of the output's variance over the calibration that is kept")
    rank: int = setting(0, "the rank of all, instead of `keep`; 0 goes by `keep`")
    multiple: int = setting(64, "ranks are multiples of this, so that groups of columns fit")
    samples: int = setting(
        1024, "samples of recorded calls that tell the directions, where no further conditions were read"
    )
    select: list[str] = setting(["role:modulation"], "which linears")
    limit: float | str = limit_setting()

    def check(self) -> None:
        if not 0 < self.keep <= 1:
            raise DitqError(f"pass 'slim_modulation': keep is {self.keep}, must be above 0 and at most 1")
        if self.rank < 0 or self.multiple < 1 or self.samples < 2:
            raise DitqError("pass 'slim_modulation': rank must be 0 or more, multiple 1 or more, and samples 2 or more")

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        chosen = graph.select(self.select)
        if wrong := next((site for site in chosen if graph.sites[site].role != "modulation"), None):
            raise DitqError(f"pass 'slim_modulation': {wrong} is no modulation; select among role:modulation")
        return {site: self._said(graph.sites[site]) for site in chosen}

    def _said(self, site: LinearSite) -> str:
        if not self.rank:
            return f"rank for {self.keep:g}"
        rank = self._rounded(self.rank)
        return f"rank {rank}" if self._smaller(site, rank) else f"as it is: rank {rank} is no smaller"

    def sketch(self, graph: DiTGraph) -> None:
        """What `keep` asks for is known only after calibration: then the largest ranks that make a linear smaller."""
        for name in self.preview(graph):
            site = graph.sites[name]
            largest = (site.parameters - 1) // (site.in_features + site.out_features) // self.multiple * self.multiple
            rank = self._rounded(self.rank) or largest
            if rank and self._smaller(site, rank):
                LowRankLinear.install(graph.model, name, {"rank": rank})
        graph.refresh()

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        """Of a given rank; what `keep` asks for is known only after calibration."""
        sites = [graph.sites[name] for name in graph.select(self.select)] if self.rank else []
        return {site.name: self._work(site) for site in sites if self._smaller(site, self._rounded(self.rank))}

    def _work(self, site: LinearSite) -> Work:
        rank = self._rounded(self.rank)
        numbers = rank * (site.in_features + site.out_features)
        moved = site.tokens * (site.in_features + 2 * rank + site.out_features)
        return Work("modulation", site.tokens * numbers, numbers, numbers, moved, 2)

    def _rounded(self, rank: int) -> int:
        return -(-rank // self.multiple) * self.multiple

    @staticmethod
    def _smaller(site: LinearSite, rank: int) -> bool:
        return rank * (site.in_features + site.out_features) < site.parameters

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        moments = _moments(graph, context, list(self.preview(graph)), self.samples)
        before = after = 0
        for name in context.track(self.name, list(self.preview(graph))):
            site, linear = graph.sites[name], plain_linear(graph, name)
            mean, covariance = moments[name]
            spread = covariance.diagonal().mean()
            covariance.diagonal().add_(UNSEEN * spread)
            directions, energies = principal_outputs(linear.weight, covariance)
            rank = self._rounded(self.rank or rank_for(energies, self.keep))
            row = {"site": name, "shape": f"{site.out_features}x{site.in_features}", "rank": rank}
            before += site.parameters
            if not self._smaller(site, rank) or spread <= CONSTANT * mean.square().mean():
                report.rows.append({**row, "rank": None, "variance lost": 0.0})
                after += site.parameters
                continue
            weight, up = linear.weight.double(), directions[:, :rank]
            part = LowRankLinear.of(linear, rank)
            down = up.T @ weight
            bias = weight.new_zeros(site.out_features) if linear.bias is None else linear.bias.double()
            bias = bias + (weight - up @ down) @ mean
            missing = rank - up.shape[1]  # fewer directions than asked for: the rest of them say nothing
            part.set(torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing)), bias)
            graph.replace(name, part)
            after += rank * (site.in_features + site.out_features)
            report.rows.append(
                {**row, "variance lost": float(energies[rank:].sum() / energies.sum().clamp_min(1e-300))}
            )
        graph.refresh()
        report.summary = {"linears": len(report.rows), "weights before": before, "weights after": after}
        return gated(report, graph, context, self.limit)


@torch.no_grad()
def _moments(graph: DiTGraph, context: Context, sites: list[str], samples: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each linear's input the mean [I] and the covariance [I, I], over conditions that do not judge: of further conditions
    that were not drawn where their vectors tell it, else over recorded calls.

    How far unseen prompts reach beyond the directions of those that were seen is what is lost most, and only conditions left
    out can tell. Without recorded calls, those of the statistics.
    """
    if not context.has_trajectories:
        found = {site: context.statistics(graph.sites[site].group) for site in sites}
        return {site: _centred(known.mean().double(), known.hessian().double()) for site, known in found.items()}
    groups = {graph.sites[site].group: graph.groups[graph.sites[site].group] for site in sites}
    sums = {name: _Sums(group.width) for name, group in groups.items()}
    trajectories, device = context.trajectories(), next(graph.model.parameters()).device
    told: set[str] = set()
    further = FurtherConditions.of(trajectories)
    if further is None and context.calibration.get("modulation_conditions"):
        raise DitqError(
            "pass 'slim_modulation': the further conditions that were read are gone from the trajectories; make them anew with "
            "ditq calibrate --resume"
        )
    if further is not None:
        told = further.groups(graph, groups.values(), device)
        others = further.without(held_out_conditions(trajectories))
        others.read(graph, {name: sums[name] for name in told}, 1, device)
    _read_calls(graph, context, {name: found for name, found in sums.items() if name not in told}, samples)
    return {site: sums[graph.sites[site].group].moments() for site in sites}


class _Sums:
    """Of rows [R, I], in float64."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._total = torch.zeros(width, dtype=torch.float64)
        self._square = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor, _: int = 0) -> bool:
        rows = rows.double().cpu()
        self._count += len(rows)
        self._total += rows.sum(0)
        self._square += rows.T @ rows
        return True

    def moments(self) -> tuple[Tensor, Tensor]:
        return _centred(self._total / self._count, self._square / self._count)


def _read_calls(graph: DiTGraph, context: Context, sums: Mapping[str, _Sums], samples: int) -> None:
    """Add up what inputs are in recorded calls."""
    if not sums:
        return

    def seen(found: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found.add(given[0].reshape(-1, given[0].shape[-1]))

        return hook

    trajectories = context.trajectories()
    batches = sampled_batches(trajectories, samples, 16, context.seed, teaching_conditions(trajectories))
    with ExitStack() as hooks:
        for name, found in sums.items():
            site = graph.linear(graph.groups[name].sites[0])
            hooks.callback(site.register_forward_pre_hook(seen(found)).remove)
        for batch in context.track("modulation", batches):
            call(graph.model, batch)


def _centred(mean: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [I], E[x x^T] - mean mean^T [I, I])."""
    return mean, moment - torch.outer(mean, mean)
