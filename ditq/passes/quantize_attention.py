"""quantize_attention: what attentions multiply (queries, keys, values, probabilities) on a grid of 8 bits, at run time; and
their outputs."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar

from torch import Tensor, nn

from ditq.calibration.batches import CallBatch, sampled_batches
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn import attention_rounding
from ditq.nn.answered_attention import answering
from ditq.nn.attention_rounding import AttentionRounding, watched
from ditq.numerics.attention_rounding import FORMATS, AttentionFormat
from ditq.parts import Attention
from ditq.passes.attention_conversion import CONVERSIONS
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.block_records import call

JUDGED = 8  # recorded calls that static scales are found and the report's errors are measured on
SCALES = ("dynamic", "static")
MOST_MARGIN = 1024


@register
@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Round what attentions multiply to 8 bits: queries q, keys k, values v and the probabilities p of the softmax.

    Dynamic scales are found at run time, one a token and head for q and k, one a channel and head for v; those of p are
    fixed. `rotate` spreads what a few channels of queries and keys hold over all of them, which leaves their products as they
    are. Static ones are the largest number of an attention's queries, of its keys and of its values in recorded calls, with
    a margin. Outputs o are rounded by the scale of v. Where both parts of a product are int8, onnxruntime-cpu multiplies
    integers; target cuda multiplies FP8 in `float8_e4m3` of parts `qkvpo` with static scales. `smooth_keys` takes the mean over
    the tokens out of the keys, which the softmax cancels. Weights stay as they are, so the pass may stand anywhere in a recipe,
    with static scales behind `smooth` and `rotate`; `reconstruct` behind it learns with it.

    Source: SageAttention (Zhang 2024, arXiv 2410.02367); for the rotation FlashAttention-3 (Shah 2024, arXiv 2407.08608).
    numerics/attention_rounding.py has the formulas.

    Example:
        - quantize: {format: w4a8}
        - quantize_attention: {format: int8, parts: qk}
    """

    name: ClassVar[str] = "quantize_attention"
    not_after: ClassVar[tuple[str, ...]] = ("quantize_attention", *CONVERSIONS)
    format: str = setting("int8", "the numbers that are multiplied", FORMATS)
    parts: str = setting("qkvp", "what is rounded: letters for queries, keys, values, probabilities, outputs")
    smooth_keys: bool = setting(True, "take the mean over the tokens out of the keys before they are rounded; exact")
    rotate: bool = setting(True, "multiply queries and keys by one Hadamard matrix before they are rounded; exact")
    scales: str = setting("dynamic", "dynamic: of each call; static: of recorded calls, for float8_e4m3", SCALES)
    margin: float = setting(
        4.0,
        "how many times the largest recorded number a static scale reaches, at most 1024",
        only=("scales", ("static",)),
    )
    select: list[str] = setting(["*"], "which attentions, as patterns of their modules' names")

    @property
    def requires_statistics(self) -> bool:
        return self.scales == "static"

    @property
    def spoiled_by(self) -> tuple[str, ...]:
        return ("smooth", "rotate") if self.scales == "static" else ()

    def check(self) -> None:
        try:
            self._form((1.0, 1.0, 1.0) if self.scales == "static" else ())
        except ValueError as error:
            raise DitqError(f"pass 'quantize_attention': {error}") from error
        if not 1 <= self.margin <= MOST_MARGIN:
            below = f"is above {MOST_MARGIN}, where FP8 has no exponents left for small numbers"
            why = "is below 1 and would clip what was recorded" if self.margin < 1 else below
            raise DitqError(f"pass 'quantize_attention': margin {self.margin:g} {why}")

    def _form(self, scales: tuple[float, ...] = ()) -> AttentionFormat:
        return AttentionFormat(self.format, self.parts, self.smooth_keys, scales, self.rotate)

    def _selected(self, graph: DiTGraph) -> dict[str, list[Attention]]:
        """The attentions of each selected module, by the module's name.

        Raises:
            DitqError: a pattern that matches nothing, or an attention of a kind that is not rounded.
        """
        modules: dict[str, list[Attention]] = defaultdict(list)
        for found in graph.attentions.values():
            modules[found.module].append(found)
        wanted: set[str] = set()
        for pattern in self.select:
            matching = fnmatch.filter(modules, pattern)
            if not matching:
                raise DitqError(
                    f"pass 'quantize_attention': {pattern!r} matches no attention; there are {', '.join(modules) or 'none'}"
                )
            wanted.update(matching)
        for name, attentions in modules.items():
            part = answering(graph.model.get_submodule(name))
            if name in wanted and part is not None:
                raise DitqError(
                    f"pass 'quantize_attention': {name} is {part.what} by now, which is not rounded; leave it out of select"
                )
            if name in wanted and not all(found.plain for found in attentions):
                raise DitqError(
                    f"pass 'quantize_attention': {name} is causal or shares keys between heads; leave it out of select"
                )
        return {name: found for name, found in modules.items() if name in wanted}

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        form = self._form()
        attentions = [found for each in self._selected(graph).values() for found in each]
        sites = {site for found in attentions for site in (*found.queries, *found.keys, *found.values)}
        return {site: f"attention {form.number} {form.parts}" for site in graph.sites if site in sites}

    def runtime_cost(self, graph: DiTGraph) -> tuple[int, int]:
        """Of the rotation: a product with a matrix [d, d] for each query and key of each head."""
        added = 0
        for found in chain.from_iterable(self._selected(graph).values()) if self._form().turns else ():
            width = found.heads * found.head_width
            rows = found.tokens + found.macs // (
                2 * found.tokens * width
            )  # and keys, as the products of both tell them
            added += rows * width * found.head_width
        return added, added

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        selected, form = self._selected(graph), self._form()
        static: dict[str, tuple[float, ...]] = {}
        if self.scales == "static":
            static = _static_scales(graph.model, selected, context, form, self.margin)
        made = {
            name: attention_rounding.attach(
                graph.model.get_submodule(name), name, self._form(static[name]) if static else form
            )
            for name in selected
        }
        errors = _errors(graph.model, made, context) if context.has_trajectories else {}
        for name in selected:
            row = {"attention": name, "format": form.number, "parts": form.parts}
            if static:
                row["scales"] = ", ".join(f"{scale:.3g}" for scale in static[name])
            report.rows.append(row | ({"output error": errors[name]} if name in errors else {}))
        report.summary = {"attentions": len(selected)}
        if errors:
            report.summary["mean output error"] = sum(errors.values()) / len(errors)
        return report


def _batches(context: Context) -> list[CallBatch]:
    """Recorded calls of one step each: linears with a scale a timestep bin go by the first sample of a call."""
    return sampled_batches(context.trajectories(), JUDGED, 1, context.seed)


def _static_scales(
    model: nn.Module, modules: Iterable[str], context: Context, form: AttentionFormat, margin: float
) -> dict[str, tuple[float, ...]]:
    """Those of each attention on recorded calls, as the model is now."""
    batches = _batches(context)
    with watched(model, modules, form.turns) as found:
        for batch in context.track("largest numbers of attentions", batches):
            call(model, batch)
    return {name: part.scales(form.number, margin) for name, part in found.items()}


def _errors(model: nn.Module, roundings: Mapping[str, AttentionRounding], context: Context) -> dict[str, float]:
    """||y - y'||^2 / ||y||^2 of each attention's output on recorded calls, both with the inputs that it gets now."""
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in roundings}

    def add(name: str, rounded: Tensor, exact: Tensor) -> None:
        sums[name][0] += float((rounded.double() - exact.double()).square().sum())
        sums[name][1] += float(exact.double().square().sum())

    watches: dict[str, Callable[[Tensor, Tensor], None]] = {name: partial(add, name) for name in roundings}
    batches = _batches(context)
    try:
        for name, rounding in roundings.items():
            rounding.watch = watches[name]
        for batch in context.track("attention errors", batches):
            call(model, batch)
    finally:
        for rounding in roundings.values():
            rounding.watch = None
    return {name: lost / max(energy, 1e-30) for name, (lost, energy) in sums.items()}
