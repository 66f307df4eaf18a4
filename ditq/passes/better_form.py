"""Which form a feed-forward takes: a mixture of experts, a pruned one, or as it was, by what the model's answers lose."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq.calibration.batches import CallBatch
from ditq.calibration.sampler import find_sampler
from ditq.graph import DiTGraph
from ditq.nn.structural.experts import MixtureOfExperts
from ditq.passes.base import Context
from ditq.passes.feed_forwards import Place, Tokens, importance_of
from ditq.passes.gate import HeldOutCalls
from ditq.passes.prune import pruned

JUDGED = 4  # batches that answers are compared on
STEP = 16  # channels that the width of equal time is a multiple of: it is measured, and so not exact
MOST = 1024  # tokens that times are measured with


class BetterForm:
    """Chooses for each feed-forward.

    A mixture stays where the answers lose less with it than with a pruned feed-forward, by at least the share `margin`. The
    pruned one has as many channels as the mixture has active; with `latency` as many as take the same time, measured. Where
    these are all of them, the feed-forward stays dense: experts would be no faster. Times are measured once for feed-forwards
    of one size.

    The error of a feed-forward's own output misleads: errors that are alike for many tokens add up in the answer.
    """

    def __init__(
        self, graph: DiTGraph, batches: list[CallBatch], context: Context, margin: float, refit: bool, latency: bool
    ) -> None:
        assert context.original is not None
        sampler = find_sampler(context.original, context.trajectories())
        self.judge = HeldOutCalls.judging(context.original, batches[:JUDGED], sampler)
        self.graph, self.context, self.margin, self.refit, self.latency = graph, context, margin, refit, latency
        self._tokens = {name: site.tokens for name, site in graph.sites.items()}
        self._widths: dict[tuple[object, ...], int] = {}

    def choose(
        self, place: Place, tokens: Tokens, made: MixtureOfExperts, active: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """What stands there from now on, and what to report of it. active: hidden channels that a token passes through."""
        dense = self.graph.linear(place.module)
        width = self._width(place, tokens, made, active) if self.latency else active
        if width == place.form.hidden:
            return dense, {"form": "dense", "pruned to": width, "error": 0.0}
        smaller, error = self._pruned(place, tokens, width)
        before = self.judge.error(self.graph.model)
        lost: dict[str, float] = {}
        parts: dict[str, nn.Module] = {"experts": made, "pruned": smaller}
        for name, part in parts.items():
            self.graph.replace(place.module, part)
            lost[name] = self.judge.error(self.graph.model) - before
        self.graph.replace(place.module, dense)
        form = "experts" if lost["experts"] <= (1 - self.margin) * lost["pruned"] else "pruned"
        row = {"form": form, "pruned to": width, "answers lose": lost["experts"], "with pruned": lost["pruned"]}
        return parts[form], row | ({"error": error} if form == "pruned" else {})

    def _pruned(self, place: Place, tokens: Tokens, width: int) -> tuple[nn.Module, float]:
        importance = importance_of("needed", place, tokens, width, {}, self.context.seed)
        channels = importance.topk(width).indices.sort().values
        return pruned(self.graph.linear(place.module), place.form, channels, tokens, self.refit)

    def _width(self, place: Place, tokens: Tokens, made: MixtureOfExperts, active: int) -> int:
        """Hidden channels of a pruned feed-forward that takes as long as the mixture; time is linear in them."""
        hidden, count = place.form.hidden, self._count(place)
        key = (hidden, count, *(tuple(weight.shape) for weight in made.parameters()))
        if key not in self._widths:
            assert self.context.latency is not None
            dense = self.graph.linear(place.module)
            narrow, _ = self._pruned(place, tokens, active)
            rows = tokens.x[torch.arange(count) % len(tokens.x)].float()[None]
            least, most, mixture = self.context.latency((narrow, dense, made), rows)
            share = (mixture - least) / max(most - least, 1e-12)
            width = active + STEP * round(share * (hidden - active) / STEP)
            self._widths[key] = min(max(width, active), hidden)
        return self._widths[key]

    def _count(self, place: Place) -> int:
        """Tokens of a call."""
        return min(self._tokens[place.name], MOST)
