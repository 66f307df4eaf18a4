"""prune: feed-forwards keep the hidden channels that matter; the output linear is fitted anew to what the dense one gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.sliced import FeedForwardForm, set_output, sliced
from ditq.nn.structural.pruned import PrunedFeedForward
from ditq.numerics.experts import ridge, weighted_mean
from ditq.parts import Work
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.feed_forwards import (
    IMPORTANCES,
    WEIGHTINGS,
    Tokens,
    check_sampling,
    importance_of,
    isolated,
    selected,
    taylor_importances,
    teaching_batches,
    tokens_of_places,
)
from ditq.passes.gate import gated, limit_setting


@register
@dataclass(frozen=True)
class Prune(Pass):
    """Keep a part of the hidden channels of feed-forwards, the same for all tokens.

    What channels that go had as their mean goes into the bias, and the output linear is fitted anew by least squares to what
    the dense feed-forward gave on recorded tokens. Beside `moe` it is the control: as many multiplications, no router.

    Example:
        - prune: {keep: 0.375}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "prune"
    structural: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("moe", "prune")
    keep: float = setting(0.375, "share of the hidden channels that stay")
    importance: str = setting("needed", "what tells which channels stay", IMPORTANCES)
    refit: bool = setting(True, "fit the output linear anew by least squares")
    samples: int = setting(256, "recorded denoiser calls that tokens are taken from")
    weighting: str = setting(
        "answer", "what a token counts: its effect on the model's answer, or all alike", WEIGHTINGS
    )
    rows: int = setting(16384, "tokens of each feed-forward; at least four a hidden channel are taken")
    select: list[str] = setting(["*"], "which feed-forwards, as patterns of their output linears' names")
    limit: float | str = limit_setting()

    def check(self) -> None:
        if not 0 < self.keep <= 1:
            raise DitqError(f"pass 'prune': keep is {self.keep}, must be above 0 and at most 1")
        check_sampling(self.name, self.samples, self.rows)

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        said = f"keep {self.keep:.1%} of hidden"
        return {
            site: said for each in selected(graph, self.select, self.name) for site in (*each.inputs, each.output.site)
        }

    def sketch(self, graph: DiTGraph) -> None:
        for place in isolated(graph, self.select, self.name):
            spec = {"form": place.form.spec(), "width": self._kept(place.form.hidden)}
            PrunedFeedForward.install(graph.model, place.module, spec)
        graph.refresh()

    def _kept(self, hidden: int) -> int:
        return max(1, round(self.keep * hidden))

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        found: dict[str, Work] = {}
        for each in selected(graph, self.select, self.name):
            kept, output = self._kept(each.hidden), graph.sites[each.output.site]
            for name in each.inputs:
                site = graph.sites[name]
                rows = kept * site.out_features // each.hidden
                found[name] = Work.of_linear("feed-forward", site.tokens, site.in_features, rows)
            left = output.in_features - each.hidden + kept
            found[output.name] = Work.of_linear("feed-forward", output.tokens, left, output.out_features)
        return found

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        places = isolated(graph, self.select, self.name)
        batches = teaching_batches(context, self.samples)
        taylor = taylor_importances(graph.model, places, batches, context) if self.importance == "taylor" else {}
        for place, tokens in tokens_of_places(graph.model, places, batches, self.rows, self.weighting, context):
            dense = graph.model.get_submodule(place.module)
            keep = self._kept(place.form.hidden)
            importance = importance_of(self.importance, place, tokens, keep, taylor, context.seed)
            channels = importance.topk(keep).indices.sort().values
            made, error = pruned(dense, place.form, channels, tokens, self.refit)
            graph.replace(place.module, made)
            report.rows.append({"feed-forward": place.name, "hidden": place.form.hidden, "kept": keep, "error": error})
        graph.refresh()
        errors: list[Any] = [row["error"] for row in report.rows]
        report.summary = {"feed-forwards": len(errors), "mean error": sum(errors) / len(errors)}
        return gated(report, graph, context, self.limit)


def pruned(
    dense: nn.Module, form: FeedForwardForm, channels: Tensor, tokens: Tokens, refit: bool
) -> tuple[PrunedFeedForward, float]:
    """The feed-forward with these channels only, and its relative error on held-out tokens."""
    lessons, kept = tokens.lessons, tokens.weight[:, channels]
    features = tokens.a[:, channels]
    if refit:
        fitted, bias = ridge(features[lessons], tokens.y[lessons], tokens.counts[lessons], kept)
    else:
        fitted = kept.double()
        bias = weighted_mean((tokens.y - features @ kept.T)[lessons], tokens.counts[lessons])
    inner = sliced(dense, form, channels)
    set_output(inner, form, fitted, bias)
    made = PrunedFeedForward(inner, form, len(channels))
    return made, tokens.error(features[tokens.judges].double() @ fitted.T + bias)
