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
from ditq.processes import agreed, is_first

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
        width, *lost = self._decided(place, tokens, made, active)
        width = int(width)
        if width == place.form.hidden:
            return dense, {"form": "dense", "pruned to": width, "error": 0.0}
        row = {"pruned to": width, "answers lose": lost[0], "with pruned": lost[1]}
        if lost[0] <= (1 - self.margin) * lost[1]:
            return made, {"form": "experts", **row}
        smaller, error = self._pruned(place, tokens, width)
        return smaller, {"form": "pruned", **row, "error": error}

    def _decided(self, place: Place, tokens: Tokens, made: MixtureOfExperts, active: int) -> list[float]:
        """Width of the pruned form, and what the answers lose with the mixture and with it.

        Times differ from one measurement to the next, and with them the forms. So an interrupted compile keeps what was found,
        and of several processes the first one decides.
        """
        found: list[float] | None = None
        if is_first():
            figures = self.context.cached_tensors(
                f"moe.{place.name}.{made.choice}",
                lambda: {"found": torch.tensor(self._measured(place, tokens, made, active), dtype=torch.float64)},
            )
            found = figures["found"].tolist()
        decided: list[float] = agreed(found)
        self._widths[self._size(place, made)] = int(decided[0])
        return decided

    def _measured(self, place: Place, tokens: Tokens, made: MixtureOfExperts, active: int) -> list[float]:
        width = self._width(place, tokens, made, active) if self.latency else active
        if width == place.form.hidden:
            return [width, 0.0, 0.0]
        dense, before, lost = self.graph.linear(place.module), self.judge.error(self.graph.model), []
        for part in (made, self._pruned(place, tokens, width)[0]):
            self.graph.replace(place.module, part)
            lost.append(self.judge.error(self.graph.model) - before)
        self.graph.replace(place.module, dense)
        return [width, *lost]

    def _pruned(self, place: Place, tokens: Tokens, width: int) -> tuple[nn.Module, float]:
        importance = importance_of("needed", place, tokens, width, {}, self.context.seed)
        channels = importance.topk(width).indices.sort().values
        return pruned(self.graph.linear(place.module), place.form, channels, tokens, self.refit)

    def _width(self, place: Place, tokens: Tokens, made: MixtureOfExperts, active: int) -> int:
        """Hidden channels of a pruned feed-forward that takes as long as the mixture; time is linear in them."""
        hidden, count, key = place.form.hidden, self._count(place), self._size(place, made)
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

    def _size(self, place: Place, made: MixtureOfExperts) -> tuple[object, ...]:
        """What feed-forwards that take the same time have in common."""
        return place.form.hidden, self._count(place), *(tuple(weight.shape) for weight in made.parameters())

    def _count(self, place: Place) -> int:
        """Tokens of a call."""
        return min(self._tokens[place.name], MOST)
