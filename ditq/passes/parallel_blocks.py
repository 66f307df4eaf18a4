"""parallel_blocks: of pairs of neighbouring blocks the second reads what the first reads, so that both can run at once."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ditq.calibration.sampler import find_sampler
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural.parallel_block import ParallelBlock, pair, paired
from ditq.nn.structural.scheduled_block import scheduled_blocks
from ditq.numerics.disjoint_pairs import least_pairs
from ditq.parts import Carried
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.feed_forwards import teaching_batches
from ditq.passes.gate import HeldOutCalls, decibels, gated, limit_setting


@dataclass(frozen=True)
class Pair:
    """Two neighbouring blocks, and what they hand on."""

    first: str
    second: str
    carried: Carried

    def part(self) -> ParallelBlock:
        carried = self.carried
        return ParallelBlock(self.first, arguments=carried.arguments, carried=carried.names, bare=carried.bare)


@register
@dataclass(frozen=True)
class ParallelBlocks(Pass):
    """Let blocks f and g of chosen pairs give f(x) + g(x) - x instead of g(f(x)): half the depth there, the same multiply-adds.

    Each pair is measured alone by the error of the model's answers on recorded calls; of all sets of `count` disjoint pairs
    the one of least error in sum is taken, and measured as a whole. It needs training: put `distill` behind it.

    Source: Grafting (Chandrasegaran et al., arXiv 2506.05340), where all blocks of DiT-XL/2 run in pairs, each retrained.

    Example:
        - parallel_blocks: {count: 2}
        - distill: {steps: 500}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "parallel_blocks"
    structural: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("mob", "parallel_blocks")
    count: int = setting(1, "pairs that run in parallel; as many as there can be where there are fewer")
    layers: list[str] = setting(["*"], "first blocks of the pairs that may, as patterns of their names")
    samples: int = setting(128, "recorded denoiser calls that the choice is judged by")
    limit: float | str = limit_setting()

    def check(self) -> None:
        for key in ("count", "samples"):
            if getattr(self, key) < 1:
                raise DitqError(f"pass 'parallel_blocks': {key} is {getattr(self, key)}, must be 1 or more")

    def pairs(self, graph: DiTGraph) -> list[Pair]:
        """Those that there could be, in order; they may share blocks.

        Raises:
            DitqError: a pattern that is no first block of a pair.
        """
        taken = {name for both in paired(graph.model).items() for name in both} | set(scheduled_blocks(graph.model))
        blocks = list(graph.blocks.values())
        known = {
            first.name: Pair(first.name, second.name, first.carried)
            for first, second in pairwise(blocks)
            if first.stack == second.stack and first.carried is not None and second.carried is not None
            if not taken & {first.name, second.name}
        }
        for pattern in self.layers:
            if not fnmatch.filter(known, pattern):
                raise DitqError(
                    f"pass 'parallel_blocks': {pattern!r} matches no block that the next could run beside; there are "
                    f"{', '.join(known) or 'none'}"
                )
        return [found for name, found in known.items() if any(fnmatch.fnmatch(name, each) for each in self.layers)]

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        chosen = {block for found in self.pairs(graph) for block in (found.first, found.second)}
        return {site: "may run in parallel" for block in chosen for site in graph.blocks[block].sites}

    def sketch(self, graph: DiTGraph) -> None:
        """Some pairs, as many as there will be: which is not known yet, and no linear is called otherwise for it."""
        pairs = self.pairs(graph)
        for place in least_pairs([(found.first, found.second) for found in pairs], [0.0] * len(pairs), self.count):
            pair(graph.model, pairs[place].second, pairs[place].part())
        graph.refresh()

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        pairs, model = self.pairs(graph), graph.model
        sampler = find_sampler(context.original or model, context.trajectories())
        judge = HeldOutCalls.judging(model, teaching_batches(context, self.samples), sampler)
        alone = []
        for found in context.track("pairs", pairs):
            undo = pair(model, found.second, found.part())
            alone.append(judge.error(model))
            undo()
        chosen = least_pairs([(found.first, found.second) for found in pairs], alone, self.count)
        for place in chosen:
            pair(model, pairs[place].second, pairs[place].part())
        graph.refresh()
        report.rows = [
            {
                "block": found.second,
                "reads what is read by": found.first,
                "error alone, dB": decibels(error),
                "parallel": place in chosen,
            }
            for place, (found, error) in enumerate(zip(pairs, alone, strict=True))
        ]
        report.summary = {
            "pairs": len(chosen),
            "blocks in a row": f"{len(graph.blocks) - len(chosen)} of {len(graph.blocks)}",
            "predicted error, dB": decibels(sum(alone[place] for place in chosen)),
            "error on the calls that chose, dB": decibels(judge.error(model)),
        }
        return gated(report, graph, context, self.limit)
