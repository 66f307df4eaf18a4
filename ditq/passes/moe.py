"""moe: dense feed-forwards become mixtures of experts, with no new weights but those of a small router."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.calibration.batches import CallBatch
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.sliced import linear_of
from ditq.nn.structural.experts import MixtureOfExperts, divided
from ditq.numerics.experts import balance_offset, cluster_channels, contributions, ridge, weighted_mean
from ditq.numerics.routing import FINENESS
from ditq.parts import Work
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.better_form import BetterForm
from ditq.passes.expert_load import measure_load, summary_of
from ditq.passes.feed_forwards import (
    IMPORTANCES,
    WEIGHTINGS,
    Place,
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

CLUSTERED = 4096  # tokens that channels are clustered by
BALANCED = 1.25  # capacity that `capacity: auto` balances loads for
MOST = 2.0  # capacity that it gives at most
CROWDED = 0.25  # share of the answers asked for that find no slot, beyond which `choice: auto` lets the experts choose


@register
@dataclass(frozen=True)
class MixtureOfExpertsPass(Pass):
    """Each feed-forward becomes one shared expert for all tokens and routed experts of which a token gets `top`.

    The hidden channels are divided: the most important make the shared expert, channels that are active for the same tokens an
    expert each. What an expert's channels are in the mean goes into the bias, so that a token without the expert gets that.
    The router predicts how far each expert would move the output of a token. Last, the output linear is fitted anew by least
    squares to what the dense feed-forward gave, with the experts chosen as the router chooses them.

    With the defaults 62.5 % fewer parameters of feed-forwards are active for a token. `choose: better` puts a pruned
    feed-forward of the same active width, which needs no routing, where the model's answers do not lose less by at least
    `margin` with experts; `choose: latency` one that takes the same time, measured, or leaves the dense one where experts
    are no faster than it.

    Sources: Dense2MoE (arXiv 2510.09094), clustering of CMoE (arXiv 2502.04416).

    Example:
        - moe: {experts: 12, top: 2}
        - distill: {steps: 300}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "moe"
    structural: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("moe", "prune")
    shared: float = setting(0.25, "share of the hidden channels that are for all tokens")
    experts: int = setting(12, "routed experts")
    top: int = setting(2, "experts that a token gets")
    capacity: float | str = setting(
        1.25, "slots of an expert over its equal share of the tokens; those beyond it go without", words=("auto",)
    )
    choice: str = setting(
        "auto",
        "tokens choose experts, or each expert the tokens of its sample; auto: experts where too many tokens find no slot",
        ("auto", "token", "expert"),
    )
    importance: str = setting("needed", "what tells which channels are shared, as in prune", IMPORTANCES)
    split: str = setting("cluster", "how the others are divided", ("cluster", "rank", "random"))
    router: str = setting(
        "ridge",
        "fitted to the experts' contributions, or a representative channel of each",
        ("ridge", "representative"),
    )
    refit: bool = setting(True, "fit the output linear anew by least squares")
    choose: str = setting(
        "experts",
        "experts everywhere, or pruned ones where experts are no better: of as many active channels, or as fast",
        ("experts", "better", "latency"),
    )
    margin: float = setting(
        0.1,
        "`better` and `latency`: by what share less the answers must lose with a mixture",
        only=("choose", ("better", "latency")),
    )
    samples: int = setting(256, "recorded denoiser calls that tokens are taken from")
    weighting: str = setting(
        "answer", "what a token counts: its effect on the model's answer, or all alike", WEIGHTINGS
    )
    rows: int = setting(16384, "tokens of each feed-forward; at least four a hidden channel are taken")
    select: list[str] = setting(["*"], "which feed-forwards, as patterns of their output linears' names")
    limit: float | str = limit_setting()

    def check(self) -> None:
        if self.experts < 2 or not 1 <= self.top <= self.experts:
            given = f"experts is {self.experts} and top {self.top}"
            raise DitqError(f"pass 'moe': {given}; experts must be 2 or more, and top from 1 to experts")
        if not 0 <= self.shared < 1:
            raise DitqError(f"pass 'moe': shared is {self.shared}, must be at least 0 and below 1")
        if self._capacity < 1:
            raise DitqError(f"pass 'moe': capacity is {self.capacity}, must be 1 or more")
        if not 0 <= self.margin < 1:
            raise DitqError(f"pass 'moe': margin is {self.margin}, must be at least 0 and below 1")
        check_sampling(self.name, self.samples, self.rows)

    def _widths(self, hidden: int) -> tuple[int, int]:
        """Hidden channels of the shared expert, and of each routed one."""
        routed = round(hidden * (1 - self.shared)) // self.experts
        return hidden - routed * self.experts, routed

    @property
    def _capacity(self) -> float:
        """That loads are balanced for, and where it goes by the load the one that costs are told of."""
        return BALANCED if isinstance(self.capacity, str) else self.capacity

    def active(self, hidden: int) -> int:
        """Hidden channels that a token passes through."""
        shared, routed = self._widths(hidden)
        return shared + self.top * routed

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        said: dict[str, str] = {}
        for each in selected(graph, self.select, self.name):
            shared, routed = self._widths(each.hidden)
            if not shared:
                raise DitqError(
                    f"pass 'moe': {each.name}: shared: {self.shared} leaves no channel for all tokens; set it higher"
                )
            if not routed:
                raise DitqError(
                    f"pass 'moe': {each.name} has {each.hidden} hidden channels, too few for {self.experts} experts"
                )
            what = f"experts {shared}+{self.top}x{routed} of {each.hidden}"
            said |= dict.fromkeys((*each.inputs, each.output.site), what)
        return said

    def sketch(self, graph: DiTGraph) -> None:
        for place in isolated(graph, self.select, self.name):
            MixtureOfExperts.install(graph.model, place.module, self._spec(place))
        graph.refresh()

    def _spec(self, place: Place) -> dict[str, Any]:
        return {
            "form": place.form.spec(),
            "experts": self.experts,
            "width": self._widths(place.form.hidden)[1],
            "router": "representative" if self.router == "representative" else "linear",
            "top": self.top,
            "capacity": self._capacity,
            "choice": "expert" if self.choice == "expert" else "token",
        }

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        found: dict[str, Work] = {}
        for each in selected(graph, self.select, self.name):
            shared, routed = self._widths(each.hidden)
            answered = min(self.top * self._capacity, self.experts)
            slots = self.experts * max(1, math.ceil(graph.sites[each.output.site].tokens * answered / self.experts))
            for name in (*each.inputs, each.output.site):
                site = graph.sites[name]
                last = name == each.output.site
                a_channel = site.out_features if last else site.parameters // each.hidden
                other = (site.in_features - each.hidden) * site.out_features if last else 0
                router = self.experts * site.in_features if name == each.inputs[0] else 0
                found[name] = Work(
                    "feed-forward",
                    site.tokens * (other + shared * a_channel + router) + slots * routed * a_channel,
                    other + each.hidden * a_channel + router,
                    other + (shared + self.top * routed) * a_channel + router,
                    (site.tokens + slots) * (site.in_features + site.out_features),
                    2 + self.experts,
                )
        return found

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        places = isolated(graph, self.select, self.name)
        batches = teaching_batches(context, self.samples)
        taylor = taylor_importances(graph.model, places, batches, context) if self.importance == "taylor" else {}
        better = None
        if self.choose != "experts":
            better = BetterForm(graph, batches, context, self.margin, self.refit, self.choose == "latency")
        dense = {place.module: graph.linear(place.module) for place in places}
        choice = "token" if self.choice == "auto" else self.choice
        rows = self._replaced(graph, places, batches, taylor, better, choice, context)
        if self.capacity == "auto" and choice == "token":
            self._set_capacities(graph, batches, context)
        loads = measure_load(graph.model, batches, context)
        crowded = [place for place in places if place.module in loads and loads[place.module].dropped > CROWDED]
        if self.choice == "auto" and crowded:
            for place in crowded:
                graph.replace(place.module, dense[place.module])
            rows |= self._replaced(graph, crowded, batches, taylor, better, "expert", context)
            loads = measure_load(graph.model, batches, context)
        for place in places:
            if isinstance(part := graph.linear(place.module), MixtureOfExperts):
                rows[place.name]["capacity"] = part.capacity / FINENESS
            report.rows.append(rows[place.name] | (loads[place.module].row() if place.module in loads else {}))
        report.summary |= summary_of(loads)
        graph.refresh()
        errors: list[Any] = [row["error"] for row in report.rows]
        report.summary |= {"feed-forwards": len(errors), "mean error": sum(errors) / len(errors)}
        return gated(report, graph, context, self.limit)

    def _set_capacities(self, graph: DiTGraph, batches: Sequence[CallBatch], context: Context) -> None:
        """What each mixture's load on the recorded calls asks for, at most MOST."""
        mixtures = {name: part for name, part in graph.model.named_modules() if isinstance(part, MixtureOfExperts)}
        for part in mixtures.values():
            part.capacity = len(part.experts) * FINENESS // part.top  # a slot for every token
        for name, load in measure_load(graph.model, batches, context).items():
            mixtures[name].capacity = round(min(load.capacity, MOST) * FINENESS)

    def _replaced(
        self,
        graph: DiTGraph,
        places: Sequence[Place],
        batches: Sequence[CallBatch],
        taylor: dict[str, Tensor],
        better: BetterForm | None,
        choice: str,
        context: Context,
    ) -> dict[str, dict[str, Any]]:
        """Put mixtures, or what is better, into those places: what to report of each."""
        rows: dict[str, dict[str, Any]] = {}
        for place, tokens in tokens_of_places(graph.model, places, batches, self.rows, self.weighting, context):
            made, error = self._mixture(graph.model, place, tokens, taylor, choice, context.seed)
            hidden = place.form.hidden
            row = {"feed-forward": place.name, "hidden": hidden, "active": self.active(hidden), "error": error}
            part: nn.Module = made
            if better is not None:
                part, found = better.choose(place, tokens, made, self.active(hidden))
                row |= found
            if isinstance(part, MixtureOfExperts):
                row["chosen by"] = f"{choice}s"
            graph.replace(place.module, part)
            rows[place.name] = row
        return rows

    def _mixture(
        self, model: nn.Module, place: Place, tokens: Tokens, taylor: dict[str, Tensor], choice: str, seed: int
    ) -> tuple[MixtureOfExperts, float]:
        """The mixture, and its relative error on held-out tokens."""
        dense, form = model.get_submodule(place.module), place.form
        shared_width, width = self._widths(form.hidden)
        importance = importance_of(self.importance, place, tokens, shared_width, taylor, seed)
        order = importance.argsort(descending=True)
        shared, routed = order[:shared_width].sort().values, order[shared_width:]
        lessons = tokens.lessons
        a, mean = tokens.a[lessons], tokens.mean
        parts = self._divide(a[:, routed], routed, seed)
        given = torch.full((form.hidden,), -1).scatter(
            0, parts.flatten(), torch.arange(self.experts).repeat_interleave(width)
        )
        representatives = _central(a, parts) if self.router == "representative" else None
        mixture = divided(
            dense, form, shared, parts, representatives, top=self.top, capacity=self._capacity, choice=choice
        )
        if representatives is None:
            targets = contributions(a, mean, tokens.weight, given, self.experts)
            spread = targets.std()
            targets = targets / spread if spread > 0 else targets  # an output that never changes asks for no expert
            matrix, bias = ridge(tokens.x[lessons], targets, tokens.counts[lessons])
            mixture.router.weight.copy_(matrix)  # type: ignore[operator, union-attr]
            mixture.router.bias.copy_(bias)  # type: ignore[operator, union-attr]
        dtype = linear_of(dense, form.output).weight.dtype
        scores = mixture.scores(tokens.x[lessons].to(dtype)[None])[0].float()
        mixture.balance.copy_(balance_offset(scores, self.top, self._capacity))
        self._set_outputs(mixture, tokens, shared, parts)
        return mixture, tokens.error(mixture(tokens.x[tokens.judges].to(dtype)[None])[0])

    def _divide(self, a: Tensor, routed: Tensor, seed: int) -> Tensor:
        """The routed channels [R], most important first, a row of them an expert: [E, W]."""
        if self.split == "cluster":
            given = cluster_channels(a[:: max(1, len(a) // CLUSTERED)], self.experts, seed)
            return torch.stack([routed[given == group].sort().values for group in range(self.experts)])
        if self.split == "random":
            routed = routed[torch.randperm(len(routed), generator=torch.Generator().manual_seed(seed))]
        return routed.view(self.experts, -1)

    def _set_outputs(self, mixture: MixtureOfExperts, tokens: Tokens, shared: Tensor, parts: Tensor) -> None:
        """Output linears of all experts: means in the biases, weights fitted to y under the router's own choice."""
        lessons, mean, form = tokens.lessons, tokens.mean, mixture.form
        order = torch.cat((shared, parts.flatten()))
        fitted = tokens.weight[:, order].double()
        bias = weighted_mean(tokens.y[lessons], tokens.counts[lessons])
        if self.refit:
            mixture.chosen = []
            mixture(tokens.x[lessons].to(mixture.balance.dtype)[None])
            answered = mixture.chosen.pop()[0].T  # [M, E]
            mixture.chosen = None
            mask = answered.repeat_interleave(parts.shape[1], dim=1)
            centred = tokens.a[lessons][:, order] - mean[order]
            features = torch.cat((centred[:, : len(shared)], centred[:, len(shared) :] * mask), dim=1)
            fitted, bias = ridge(features, tokens.y[lessons], tokens.counts[lessons], fitted)
        columns = fitted.split([len(shared), *[parts.shape[1]] * self.experts], dim=1)
        _set(linear_of(mixture.shared, form.output), columns[0], bias - columns[0] @ mean[shared].double())
        for expert, part, column in zip(mixture.experts, parts, columns[1:], strict=True):
            _set(linear_of(expert, form.output), column, -(column @ mean[part].double()))


def _central(a: Tensor, parts: Tensor) -> Tensor:
    """The channel of each expert that is most like the mean of its channels: [E]."""
    standard = (a - a.mean(dim=0)) / a.std(dim=0).clamp_min(1e-12)
    found = []
    for part in parts:
        middle = standard[:, part].mean(dim=1)
        found.append(part[(standard[:, part].T @ middle).argmax()])
    return torch.stack(found)


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    assert linear.bias is not None
    linear.bias.copy_(bias)
