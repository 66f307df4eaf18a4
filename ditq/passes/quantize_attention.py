"""quantize_attention: what attentions multiply (queries, keys, values, probabilities) on a grid of 8 bits, at run time."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ditq.calibration.batches import sampled_batches
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn import attention_rounding
from ditq.nn.answered_attention import answering
from ditq.nn.attention_rounding import AttentionRounding
from ditq.numerics.attention_rounding import FORMATS, AttentionFormat
from ditq.parts import Attention
from ditq.passes.attention_conversion import CONVERSIONS
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.block_records import call

JUDGED = 8  # recorded calls that the report's errors are measured on


@register
@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Round what attentions multiply to 8 bits: queries q, keys k, values v and the probabilities p of the softmax.

    Scales are found at run time, one a token and head for q and k, one a channel and head for v; those of p are fixed. Where
    both parts of a product are int8, onnxruntime-cpu multiplies integers. `smooth_keys` takes the mean over the tokens
    out of the keys, which the softmax cancels. Weights stay as they are, so the pass may stand anywhere in a recipe;
    `reconstruct` behind it learns with it.

    Source: SageAttention (Zhang 2024, arXiv 2410.02367). numerics/attention_rounding.py has the formulas.

    Example:
        - quantize: {format: w4a8}
        - quantize_attention: {format: int8, parts: qk}
    """

    name: ClassVar[str] = "quantize_attention"
    not_after: ClassVar[tuple[str, ...]] = ("quantize_attention", *CONVERSIONS)
    format: str = setting("int8", "the numbers that are multiplied", FORMATS)
    parts: str = setting("qkvp", "what is rounded: letters for queries, keys, values, probabilities")
    smooth_keys: bool = setting(True, "take the mean over the tokens out of the keys before they are rounded; exact")
    select: list[str] = setting(["*"], "which attentions, as patterns of their modules' names")

    @property
    def requires_statistics(self) -> bool:
        return False

    def check(self) -> None:
        try:
            self._form()
        except ValueError as error:
            raise DitqError(f"pass 'quantize_attention': {error}") from error

    def _form(self) -> AttentionFormat:
        return AttentionFormat(self.format, self.parts, self.smooth_keys)

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

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        selected, form = self._selected(graph), self._form()
        made = {name: attention_rounding.attach(graph.model.get_submodule(name), name, form) for name in selected}
        errors = _errors(graph.model, made, context) if context.has_trajectories else {}
        for name in selected:
            row = {"attention": name, "format": form.number, "parts": form.parts}
            report.rows.append(row | ({"output error": errors[name]} if name in errors else {}))
        report.summary = {"attentions": len(selected)}
        if errors:
            report.summary["mean output error"] = sum(errors.values()) / len(errors)
        return report


def _errors(model: nn.Module, roundings: Mapping[str, AttentionRounding], context: Context) -> dict[str, float]:
    """||y - y'||^2 / ||y||^2 of each attention's output on recorded calls, both with the inputs that it gets now."""
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in roundings}

    def add(name: str, rounded: Tensor, exact: Tensor) -> None:
        sums[name][0] += float((rounded.double() - exact.double()).square().sum())
        sums[name][1] += float(exact.double().square().sum())

    watches: dict[str, Callable[[Tensor, Tensor], None]] = {name: partial(add, name) for name in roundings}
    batches = sampled_batches(context.trajectories(), JUDGED, JUDGED, context.seed)
    try:
        for name, rounding in roundings.items():
            rounding.watch = watches[name]
        for batch in context.track("attention errors", batches):
            call(model, batch)
    finally:
        for rounding in roundings.values():
            rounding.watch = None
    return {name: lost / max(energy, 1e-30) for name, (lost, energy) in sums.items()}
