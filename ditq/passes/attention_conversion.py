"""What passes share that put another attention in the place of softmax over all tokens: which ones, how many, at what loss."""

from __future__ import annotations

import fnmatch
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditq.calibration.batches import CallBatch, held_out_conditions, sampled_batches
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.answered_attention import answering
from ditq.nn.structural.token_attention import TokenAttention, attach
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.parts import Attention, Work
from ditq.passes.attention_records import (
    AttentionRecord,
    answers,
    attached,
    difference,
    fit_part,
    part_error,
    records_of,
)
from ditq.passes.base import Context, Pass, PassReport, setting
from ditq.passes.gate import gated

BATCH = 8  # samples of a call
CONVERSIONS = ("local_attention", "linear_attention", "compress_keys")

Candidate = tuple[dict[str, Any], TokenAttention | None]  # the report's row of a place, and its part if one is worth it


@dataclass(frozen=True)
class Place:
    """Where a part goes: the attention, how its tokens lie, whether text is among them, and the grid of a usual call."""

    attention: Attention
    layout: TokenLayout
    grid: Grid

    @property
    def site(self) -> str:
        return self.attention.module

    @property
    def arguments(self) -> dict[str, Any]:
        """The first arguments of a `TokenAttention`."""
        found, text = self.attention, bool(self.grid.text)
        return {"site": self.site, "layout": self.layout, "heads": found.heads, "width": found.head_width, "text": text}


@dataclass(frozen=True)
class AttentionConversion(Pass):
    """Settings and course of such a pass; a subclass says which part goes to a place."""

    structural = True
    not_after = CONVERSIONS
    layers: list[str] = setting(["*"], "which attentions, as patterns of their modules' names")
    fraction: float = setting(1.0, "share of them that is converted: those that alone move the denoiser's output least")
    least_share: float = setting(0.0, "refuse where attention takes less than this share of a block's multiply-adds")
    samples: int = setting(16, "recorded calls of one sample each that errors are measured on and parts learn from")

    @property
    def requires_statistics(self) -> bool:
        return True

    def check(self) -> None:
        for name in ("fraction", "least_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise DitqError(f"pass {self.name!r}: {name} is {getattr(self, name)}, must be from 0 to 1")
        if self.samples < 1:
            raise DitqError(f"pass {self.name!r}: samples must be at least 1")

    @property
    def steps(self) -> int:
        """In which the new part's own parameters learn what the attention gave."""
        return 0

    @abstractmethod
    def part(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> TokenAttention | None:
        """The part for a place, not fitted yet; None where there is nothing to gain, or nothing known without records."""

    @abstractmethod
    def described(self, part: TokenAttention) -> str:
        """The part in a word or two."""

    # --- which

    def chosen(self, graph: DiTGraph) -> dict[str, Attention]:
        """The attentions of the picture's tokens with each other that `layers` names, by module.

        Raises:
            DitqError: a pattern that matches none, or a model of which it is not known where its picture lies.
        """
        known = {
            found.module: found
            for found in graph.attentions.values()
            if found.to_each_other and found.plain and answering(graph.model.get_submodule(found.module)) is None
        }
        twice = [name.partition("#")[0] for name in graph.attentions if "#" in name]
        known = {name: found for name, found in known.items() if name not in twice}
        wanted: set[str] = set()
        for pattern in self.layers:
            matching = fnmatch.filter(known, pattern)
            if not matching:
                raise DitqError(
                    f"pass {self.name!r}: {pattern!r} matches no attention that can be converted; "
                    f"there are {', '.join(known) or 'none'}"
                )
            wanted.update(matching)
        if graph.layout is None:
            raise DitqError(
                f"pass {self.name!r}: where the picture of {type(graph.model).__name__} lies among the tokens is not known; "
                "give its family a layout"
            )
        return {name: found for name, found in known.items() if name in wanted}

    def places(self, graph: DiTGraph, arguments: dict[str, Any]) -> list[Place]:
        """The chosen attentions with the grid of a call with these arguments."""
        layout = graph.layout
        assert layout is not None
        example, grid = layout.grid(graph.example_inputs), layout.grid(arguments)
        return [
            Place(found, layout, grid.without_text() if found.tokens == example.image else grid)
            for found in self.chosen(graph).values()
            if found.tokens in (example.image, example.image + example.text)
        ]

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        sites = {site for found in self.chosen(graph).values() for site in (*found.queries, *found.keys, *found.values)}
        return {site: self.name.replace("_", " ") for site in graph.sites if site in sites}

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        """Of parts that are known before anything is measured; where only some are converted, as if they were the first."""
        places = self.places(graph, graph.example_inputs)
        found = {}
        for place in places[: round(self.fraction * len(places))]:
            part = self.part(place, [], 0)
            if part is not None:
                moved = 4 * (place.grid.text + place.grid.image) * part.heads * part.width
                numbers = sum(parameter.numel() for parameter in part.parameters())
                macs = part.macs(place.grid)
                found[place.attention.name] = Work("attention scores", macs, numbers, numbers, moved)
        return found

    # --- what

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        rows, share = self.candidates(graph, context)
        made = [(row, part) for row, part in rows if part is not None]
        if self.fraction < 1:
            made.sort(key=lambda item: item[0]["denoiser error"])
            kept = round(self.fraction * len(rows))
            for row, _ in made[kept:]:
                row["attention is"] = "left, others cost less"
            made = made[:kept]
        for _, part in made:
            attach(graph.model, part)
        graph.refresh()
        report.rows = [row for row, _ in rows]
        before = sum(row["multiply-adds before"] for row, _ in rows)
        saved = sum(row["multiply-adds before"] - row["multiply-adds"] for row, _ in made)
        report.summary = {
            "attentions": len(made),
            "of": len(rows),
            "share of attention in a block": share,
            "multiply-adds of attention, of those before": (before - saved) / before,
        }
        return gated(report, graph, context, self.settings()["limit"])  # the last of each subclass

    def candidates(self, graph: DiTGraph, context: Context) -> tuple[list[Candidate], float]:
        """A part for each place, fitted and measured alone, and the attention's share of a block's multiply-adds.

        Raises:
            DitqError: that share is below `least_share`.
        """
        trajectories = context.trajectories()
        judging = set(held_out_conditions(trajectories))
        learned = [number for number in range(len(trajectories.conditions)) if number not in judging]
        batches = sampled_batches(trajectories, self.samples, BATCH, context.seed, learned)
        places = self.places(graph, batches[0].arguments)
        share = _share(graph, places[0].grid)
        if share < self.least_share:
            raise DitqError(
                f"pass {self.name!r}: attention takes {share:.1%} of a block's multiply-adds at "
                f"{places[0].grid.height} x {places[0].grid.width} tokens, less than {self.least_share:.1%}; leave it out, or "
                "calibrate at the size that it is meant for"
            )
        wanted = answers(graph.model, batches)
        return [self._row(graph, context, place, batches, wanted) for place in context.track(self.name, places)], share

    def _row(
        self,
        graph: DiTGraph,
        context: Context,
        place: Place,
        batches: list[CallBatch],
        wanted: list[torch.Tensor],
    ) -> Candidate:
        usual = place.grid.text + place.grid.image
        row: dict[str, Any] = {
            "attention": place.site,
            "attention is": "left, nothing to gain",
            "multiply-adds before": _dense(place),
        }
        records = records_of(graph.model, place.site, batches, place.layout, bool(place.grid.text))
        part = self.part(place, records, usual)
        if part is None:
            return row, None
        if self.steps and list(part.parameters()):
            row["error before the fit"] = part_error(part, records)

            def fitted() -> dict[str, torch.Tensor]:
                fit_part(part, records, self.steps, context.seed)
                return dict(part.state_dict())

            part.load_state_dict(context.cached_tensors(f"{self.name}.{place.site}", fitted))
        row |= {
            "attention is": self.described(part),
            "multiply-adds": part.macs(place.grid),
            "output error": part_error(part, records),
        }
        if self.fraction < 1:
            with attached(graph.model, part):
                row["denoiser error"] = difference(wanted, answers(graph.model, batches))
        return row, part


@dataclass(frozen=True)
class FittedConversion(AttentionConversion):
    """One whose parts have parameters of their own."""

    fit: int = setting(200, "steps in which the new part's own parameters learn what the attention gave; 0: none")

    def check(self) -> None:
        super().check()
        if self.fit < 0:
            raise DitqError(f"pass {self.name!r}: fit must not be negative")

    @property
    def steps(self) -> int:
        return self.fit


def _dense(place: Place) -> int:
    """Multiply-adds of softmax attention there."""
    channels = place.attention.heads * place.attention.head_width
    return int(2 * channels * (place.grid.text + place.grid.image) ** 2)


def _share(graph: DiTGraph, grid: Grid) -> float:
    """N / (N + 6 D): the attention's part of a block of N tokens of width D with 12 N D^2 multiply-adds of linears."""
    widths = [found.heads * found.head_width for found in graph.attentions.values()]
    tokens = int(grid.text + grid.image)
    return tokens / (tokens + 6 * max(widths))
