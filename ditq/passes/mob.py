"""mob: of each group of consecutive blocks some run, which ones is told by the timestep (a mixture of blocks)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.calibration.batches import CallBatch
from ditq.calibration.sampler import find_sampler
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.call_timestep import ARGUMENT
from ditq.nn.structural.scheduled_block import ScheduledBlock
from ditq.numerics.timestep_bins import bin_edges
from ditq.parts import Work
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.block_groups import BlockGroup, grouped
from ditq.passes.block_records import call, tensors_of
from ditq.passes.feed_forwards import teaching_batches
from ditq.passes.gate import HeldOutCalls, decibels, gated, limit_setting


@register
@dataclass(frozen=True)
class MixtureOfBlocks(Pass):
    """Of each `group` of consecutive blocks, `keep` neighbours run, in each bin of timesteps others.

    A block that does not run hands on what it gets, and the mean of what it would have added in that bin. Which ones run is
    chosen group by group by the error of the model's answers on recorded calls, in each bin by itself, with the choice for the
    other groups as it is by then; twice around.

    With `bins: 1` the same blocks go at all timesteps, and out of the file too: depth pruning. With more, the engine holds a
    graph for each set of blocks and runs that of the timestep.

    Source: Dense2MoE (arXiv 2510.09094), whose router sees the pooled tokens too. Here only the timestep decides, so that
    nothing has to be decided while a graph runs.

    Example:
        - mob: {group: 2, keep: 1, select: [single_transformer_blocks]}
        - distill: {steps: 500}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "mob"
    structural: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("mob", "parallel_blocks")
    group: int = setting(3, "consecutive blocks of a group")
    keep: int = setting(2, "of them, those that run, neighbours")
    bins: int = setting(4, "bins of timesteps, each with a choice of its own; 1 drops the same blocks at all of them")
    mean: bool = setting(True, "a block that does not run adds its mean")
    samples: int = setting(128, "recorded denoiser calls that the choice is judged by")
    select: list[str] = setting(["*"], "which stacks of blocks, as patterns of their names")
    limit: float | str = limit_setting()

    def check(self) -> None:
        if not 1 <= self.keep < self.group:
            given = f"keep is {self.keep} and group {self.group}"
            raise DitqError(f"pass 'mob': {given}; group must be 2 or more, and keep from 1 to less than group")
        for key in ("bins", "samples"):
            if getattr(self, key) < 1:
                raise DitqError(f"pass 'mob': {key} is {getattr(self, key)}, must be 1 or more")

    def groups(self, graph: DiTGraph) -> list[BlockGroup]:
        """The groups that it would make."""
        if self.bins > 1 and ARGUMENT not in graph.example_inputs:
            raise DitqError(f"pass 'mob': the model has no argument called {ARGUMENT}; set bins: 1")
        return grouped(graph, self.select, self.group, self.keep, self.name)

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        what = f"{self.keep} of {self.group} blocks" + (f", {self.bins} bins" if self.bins > 1 else "")
        chosen = {block for group in self.groups(graph) for block in group.blocks}
        return {site: what for block in chosen for site in graph.blocks[block].sites}

    def sketch(self, graph: DiTGraph) -> None:
        bins = list(range(self.bins - 1, 0, -1))
        for group in self.groups(graph):
            for number, block in enumerate(group.blocks):
                runs = [True] * self.bins  # which ones do not run is not known yet; their linears are all there
                ScheduledBlock.install(graph.model, block, _spec(group, number, runs, bins))
        graph.refresh()

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        """Of the mean over the blocks of a group, `keep` of which run."""
        share, found = self.keep / self.group, {}
        for group in self.groups(graph):
            inside = {site for block in group.blocks for site in graph.blocks[block].sites}
            for site in (graph.sites[name] for name in inside):
                if site.role == "unused":
                    continue
                whole = Work.of_site(site)
                kept = whole.parameters if self.bins > 1 else round(share * whole.parameters)
                found[site.name] = replace(
                    whole,
                    macs=round(share * whole.macs),
                    parameters=kept,
                    activated=round(share * whole.activated),
                    moved=round(share * whole.moved),
                )
            for attention in graph.attentions.values():
                if attention.queries and set(attention.queries) <= inside:
                    found[attention.name] = Work("attention scores", round(share * attention.macs))
        return found

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        groups, batches = self.groups(graph), teaching_batches(context, self.samples)
        trajectories = context.trajectories()
        steps = len(trajectories.timesteps)
        edges: Sequence[float] = ()
        bin_of_step = torch.zeros(steps, dtype=torch.int64)
        if self.bins > 1:
            held, edges = self._bins(trajectories.timestep_arguments)
            bin_of_step = torch.tensor([held.index(step * self.bins // steps) for step in range(steps)])
        assert context.original is not None
        judge = HeldOutCalls.judging(context.original, batches, find_sampler(context.original, trajectories))
        means = _means(graph.model, groups, batches, bin_of_step, context)
        schedule = _Schedule(graph, groups, len(edges) + 1, list(edges))
        schedule.install(means if self.mean else {})
        error = _chosen(schedule, judge, bin_of_step, context)
        for group, windows in zip(groups, schedule.windows, strict=True):
            for number, block in enumerate(group.blocks):
                runs = [window[number] for window in windows]
                report.rows.append(
                    {"block": block, "runs": runs, "group": f"{group.blocks[0]} and {len(group.blocks) - 1} on"}
                )
        schedule.leave_out()
        graph.refresh()
        report.summary = {
            "groups": len(groups),
            "blocks that run": f"{sum(group.keep for group in groups)} of {sum(len(group.blocks) for group in groups)}",
            "bins of timesteps": len(edges) + 1,
            "error on the calls that chose, dB": decibels(error),
        }
        return gated(report, graph, context, self.limit)

    def _bins(self, timesteps: list[float] | None) -> tuple[list[int], tuple[float, ...]]:
        if not timesteps:
            raise DitqError(
                "pass 'mob': the recorded calls do not tell the timestep of each step, of which another denoiser may draw some "
                "(as in Wan 2.2); set bins: 1"
            )
        try:
            return bin_edges(timesteps, self.bins)
        except ValueError as error:
            raise DitqError(f"pass 'mob': {error}; set bins: 1") from error


@dataclass
class _Schedule:
    """Which blocks of each group run in each bin, kept in the model's own parts. windows: [groups][bins][blocks]."""

    graph: DiTGraph
    groups: list[BlockGroup]
    bins: int
    edges: list[float]
    windows: list[list[tuple[bool, ...]]] = field(default_factory=list)

    def install(self, means: Mapping[str, list[Tensor]]) -> None:
        """Put the parts in, all of them running."""
        for group in self.groups:
            for number, block in enumerate(group.blocks):
                runs = [True] * self.bins
                ScheduledBlock.install(self.graph.model, block, _spec(group, number, runs, self.edges))
                for parameter, value in zip(self._part(block).means, means.get(block, []), strict=False):
                    parameter.copy_(value)
            self.windows.append([(True,) * len(group.blocks)] * self.bins)

    def choose(self, number: int, windows: Sequence[tuple[bool, ...]]) -> None:
        """Of the group of that number, in each bin."""
        self.windows[number] = list(windows)
        for place, block in enumerate(self.groups[number].blocks):
            self._part(block).runs = [window[place] for window in windows]

    def leave_out(self) -> None:
        """Drop the blocks that never run."""
        for group in self.groups:
            for block in group.blocks:
                part = self._part(block)
                if not any(part.runs):
                    part.block = None

    def _part(self, block: str) -> ScheduledBlock:
        part = self.graph.model.get_submodule(block)
        assert isinstance(part, ScheduledBlock)
        return part


def _chosen(schedule: _Schedule, judge: HeldOutCalls, bin_of_step: Tensor, context: Context) -> float:
    """Choose the windows, each bin by itself; the error that is left."""
    left, model = float("nan"), schedule.graph.model
    turns = [(turn, number) for turn in range(2) for number in range(len(schedule.groups))]
    for _, number in context.track("blocks that run", turns):
        found = []
        for window in schedule.groups[number].windows:
            schedule.choose(number, [window] * schedule.bins)
            found.append(judge.errors(model, bin_of_step, schedule.bins))
        lost = torch.stack(found)  # [windows, bins]
        best = lost.argmin(dim=0).tolist()
        schedule.choose(number, [schedule.groups[number].windows[window] for window in best])
        left = float(lost.amin(dim=0).sum())
    return left


@torch.no_grad()
def _means(
    model: nn.Module, groups: Sequence[BlockGroup], batches: Sequence[CallBatch], bin_of_step: Tensor, context: Context
) -> dict[str, list[Tensor]]:
    """What each block adds to each thing that it carries, in the mean over tokens and samples of a bin: [bins, D]."""
    bins = int(bin_of_step.max()) + 1
    sums = {
        block: [torch.zeros(bins, width, dtype=torch.float64) for width in group.carried.widths]
        for group in groups
        for block in group.blocks
    }
    counts = torch.zeros(bins, dtype=torch.float64)
    present = torch.zeros(0, dtype=torch.int64)

    def watch(block: str, group: BlockGroup) -> Any:
        def hook(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            given = dict(zip(group.carried.arguments, positional, strict=False)) | keywords
            for total, name, made in zip(sums[block], group.carried.names, tensors_of(output), strict=True):
                total.index_add_(0, present, (made - given[name]).double().mean(dim=1))

        return hook

    handles = [
        model.get_submodule(block).register_forward_hook(watch(block, group), with_kwargs=True)
        for group in groups
        for block in group.blocks
    ]
    try:
        for batch in context.track("means of blocks", batches):
            present = bin_of_step[batch.steps]
            counts.index_add_(0, present, torch.ones(len(present), dtype=torch.float64))
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    share = counts.clamp_min(1)[:, None]
    return {block: [(total / share).float() for total in totals] for block, totals in sums.items()}


def _spec(group: BlockGroup, number: int, runs: list[bool], edges: Sequence[float]) -> dict[str, Any]:
    return {
        "runs": runs,
        "edges": list(edges),
        "arguments": list(group.carried.arguments),
        "carried": list(group.carried.names),
        "widths": list(group.carried.widths),
        "bare": group.carried.bare,
        "compared": number == len(group.blocks) - 1,
    }
