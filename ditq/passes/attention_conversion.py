"""What passes share that put another attention in the place of softmax over all tokens: which ones, how many, at what loss."""

from __future__ import annotations

import fnmatch
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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
from ditq.passes.placement import KEPT, LEFT, Offer, PlacementReport, placed

BATCH = 8  # samples of a call
SMALL_SHARE = 0.05  # of a block's multiply-adds; below it a choice of attentions is hardly worth the loss
CONVERSIONS = ("local_attention", "linear_attention", "compress_keys", "sparse_attention")

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
    macs: float = setting(
        1.0, "largest share of their multiply-adds that all together keep, chosen for each at least loss; 1: no limit"
    )
    least_share: float = setting(0.0, "refuse where attention takes less than this share of a block's multiply-adds")
    samples: int = setting(16, "recorded calls of one sample each that errors are measured on and parts learn from")

    @property
    def requires_statistics(self) -> bool:
        return True

    def check(self) -> None:
        for name in ("fraction", "least_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise DitqError(f"pass {self.name!r}: {name} is {getattr(self, name)}, must be from 0 to 1")
        if not self.fraction:
            raise DitqError(f"pass {self.name!r}: fraction is 0, which converts nothing; leave the pass out")
        if self.samples < 1:
            raise DitqError(f"pass {self.name!r}: samples must be at least 1")
        if not 0 < self.macs <= 1:
            raise DitqError(f"pass {self.name!r}: macs is {self.macs}, must be above 0 and at most 1")
        if self.macs < 1 and self.fraction < 1:
            raise DitqError(f"pass {self.name!r}: macs and fraction both choose attentions; set one of them")

    @property
    def steps(self) -> int:
        """In which the new part's own parameters learn what the attention gave."""
        return 0

    @abstractmethod
    def part(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> TokenAttention | None:
        """The part for a place, not fitted yet; None where there is nothing to gain, or nothing known without records."""

    def offers(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> list[TokenAttention]:
        """The parts among which `macs` chooses for a place, not fitted yet."""
        part = self.part(place, records, usual)
        return [] if part is None else [part]

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
        if self.macs < 1:
            return {
                place.attention.name: Work("attention scores", round(self.macs * place.attention.macs))
                for place in places
            }
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
        if self.macs < 1:
            return self._within_macs(graph, context)
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
            KEPT: (before - saved) / before,
        }
        return gated(report, graph, context, self.settings()["limit"])  # the last of each subclass

    def _within_macs(self, graph: DiTGraph, context: Context) -> PassReport:
        """For each attention the part that `macs` leaves at least loss, or none."""
        measured, offers = self.offered(graph, context)
        report = PlacementReport(self.name, self.settings())

        def together(chosen: Sequence[Offer]) -> float:
            with ExitStack() as stack:
                for part in (offer.part for offer in chosen if offer.part is not None):
                    stack.enter_context(attached(graph.model, part))
                return difference(measured.wanted, answers(graph.model, measured.batches))

        before = sum(_dense(place) for place in measured.places)
        chosen, report.front = placed(self.name, offers, before, self.macs, together)
        for offer in chosen:
            if offer.part is not None:
                attach(graph.model, offer.part)
        graph.refresh()
        report.rows = [
            {
                "attention": place.site,
                "attention is": got.name,
                "multiply-adds before": _dense(place),
                "multiply-adds": got.macs,
                **{f"error as {offer.name}": offer.error for offer in some[1:]},
            }
            for place, some, got in zip(measured.places, offers, chosen, strict=True)
        ]
        point = next(row for row in report.front if row["chosen"])
        report.summary = {
            "attentions": sum(offer.part is not None for offer in chosen),
            "of": len(offers),
            "share of attention in a block": measured.share,
            **{key: point[key] for key in (KEPT, "predicted error, dB", "measured error, dB")},
        }
        if measured.share < SMALL_SHARE:
            report.notes.append(
                f"attention takes only {measured.share:.1%} of a block's multiply-adds at {measured.picture}: a block keeps "
                f"at least {1 - measured.share:.1%} of them whatever attention becomes; it is worth it at larger pictures"
            )
        return gated(report, graph, context, self.settings()["limit"])

    def offered(self, graph: DiTGraph, context: Context) -> tuple[Measured, list[list[Offer]]]:
        """What each attention may become, measured alone; first that it stays."""
        measured, found = self._measured(graph, context), []
        for place in context.track(self.name, measured.places):
            some = [Offer(LEFT, _dense(place), 0.0)]
            for row, part in self._candidates(graph, context, place, measured, self.offers):
                if part is not None:
                    some.append(Offer(self.described(part), part.macs(place.grid), row["denoiser error"], part))
            found.append(some)
        return measured, found

    def candidates(self, graph: DiTGraph, context: Context) -> tuple[list[Candidate], float]:
        """A part for each place, fitted and measured alone, and the attention's share of a block's multiply-adds.

        Raises:
            DitqError: that share is below `least_share`.
        """
        measured = self._measured(graph, context)
        rows = []
        for place in context.track(self.name, measured.places):
            found = self._candidates(graph, context, place, measured, self._only)
            rows.append(found[0] if found else ({**_row(place), "attention is": "left, nothing to gain"}, None))
        return rows, measured.share

    def _only(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> list[TokenAttention]:
        part = self.part(place, records, usual)
        return [] if part is None else [part]

    def _measured(self, graph: DiTGraph, context: Context) -> Measured:
        """What all candidates are measured on."""
        trajectories = context.trajectories()
        judging = set(held_out_conditions(trajectories))
        learned = [number for number in range(len(trajectories.conditions)) if number not in judging]
        batches = sampled_batches(trajectories, self.samples, BATCH, context.seed, learned)
        places = self.places(graph, batches[0].arguments)
        found = Measured(places, batches, answers(graph.model, batches), _share(graph, places[0].grid))
        if found.share < self.least_share:
            raise DitqError(
                f"pass {self.name!r}: attention takes {found.share:.1%} of a block's multiply-adds at {found.picture}, less "
                f"than {self.least_share:.1%}; leave it out, or calibrate at the size that it is meant for"
            )
        return found

    def _candidates(
        self,
        graph: DiTGraph,
        context: Context,
        place: Place,
        measured: Measured,
        make: Callable[[Place, Sequence[AttentionRecord], int], list[TokenAttention]],
    ) -> list[Candidate]:
        """Parts for a place, fitted and measured alone."""
        batches = measured.batches
        records = records_of(graph.model, place.site, batches, place.layout, bool(place.grid.text))
        found: list[Candidate] = []
        for part in make(place, records, place.grid.text + place.grid.image):
            row = _row(place)
            name = f"{self.name}.{place.site}" + (f".{len(found)}" if found else "")
            if self.steps and list(part.parameters()):
                row["error before the fit"] = part_error(part, records)
                part.load_state_dict(context.cached_tensors(name, partial(self._fit, part, records, context.seed)))
            row |= {
                "attention is": self.described(part),
                "multiply-adds": part.macs(place.grid),
                "output error": part_error(part, records),
            }
            if self.fraction < 1 or self.macs < 1:
                with attached(graph.model, part):
                    row["denoiser error"] = difference(measured.wanted, answers(graph.model, batches))
            found.append((row, part))
        return found

    def _fit(self, part: TokenAttention, records: Sequence[AttentionRecord], seed: int) -> dict[str, torch.Tensor]:
        fit_part(part, records, self.steps, seed)
        return dict(part.state_dict())


@dataclass(frozen=True, eq=False)
class Measured:
    """Places with the recorded calls that all candidates are measured on, the model's answers to them as it is, and the
    attention's share of a block's multiply-adds there."""

    places: list[Place]
    batches: list[CallBatch]
    wanted: list[torch.Tensor]
    share: float

    @property
    def picture(self) -> str:
        grid = self.places[0].grid
        return f"{grid} tokens"


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


def _row(place: Place) -> dict[str, Any]:
    return {"attention": place.site, "attention is": "", "multiply-adds before": _dense(place)}


def _dense(place: Place) -> int:
    """Multiply-adds of softmax attention there."""
    channels = place.attention.heads * place.attention.head_width
    return int(2 * channels * (place.grid.text + place.grid.image) ** 2)


def _share(graph: DiTGraph, grid: Grid) -> float:
    """N / (N + 6 D): the attention's part of a block of N tokens of width D with 12 N D^2 multiply-adds of linears."""
    widths = [found.heads * found.head_width for found in graph.attentions.values()]
    tokens = int(grid.text + grid.image)
    return tokens / (tokens + 6 * max(widths))
