"""What passes over feed-forwards share: which ones, each as a module of its own, and the tokens that they get."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditq.calibration.batches import CallBatch, batch_size, sampled_batches, teaching_conditions
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.sliced import FeedForwardForm, hidden_of, linear_of
from ditq.nn.structural.separate_feed_forward import SeparateFeedForward
from ditq.numerics.experts import activation_importance, covariance_of, needed_importance, weighted_mean
from ditq.parts import FeedForward
from ditq.passes.base import Context
from ditq.passes.block_records import call

IMPORTANCES = ("needed", "taylor", "activation", "random")
WEIGHTINGS = ("answer", "none")
HELD_OUT = 8  # every eighth token judges what was fitted on the others
PROBED = 16  # batches that `taylor` goes back through
MEMORY = 2 << 30  # bytes of tokens that are kept at a time


@dataclass(frozen=True)
class Place:
    """A feed-forward that is a module of its own: where, and what its linears are called in it."""

    name: str  # the site of its output linear in the original model
    module: str
    form: FeedForwardForm


def selected(graph: DiTGraph, patterns: Sequence[str], who: str) -> list[FeedForward]:
    """Feed-forwards whose output linear matches any of the patterns, in model order.

    Raises:
        DitqError: a pattern that matches none, or one that is not separable from what is around it.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(graph.feed_forwards, pattern)
        if not matching:
            known = ", ".join(graph.feed_forwards) or "none"
            raise DitqError(f"pass '{who}': {pattern!r} matches no feed-forward; there are {known}")
        wanted.update(matching)
    found = [each for name, each in graph.feed_forwards.items() if name in wanted]
    for each in found:
        last = graph.sites[each.output.site].in_features == each.output.stop
        if not each.module and not (each.activation_module and last):
            raise DitqError(f"pass '{who}': {each.name} is not a module of its own; leave it out of select")
    return found


def isolate(graph: DiTGraph, found: FeedForward) -> Place:
    """Make a feed-forward a module of its own where it is not yet; exact."""
    if found.module:
        inner = [name.removeprefix(f"{found.module}.") for name in (*found.inputs, found.output.site)]
        return Place(found.name, found.module, FeedForwardForm(tuple(inner[:-1]), inner[-1], found.hidden))
    spec = {"linear_in": found.inputs[0], "activation": found.activation_module, "split": found.output.start}
    SeparateFeedForward.install(graph.model, found.output.site, spec)
    return Place(found.name, found.inputs[0], FeedForwardForm(("linear_in",), "linear_out", found.hidden))


def isolated(graph: DiTGraph, patterns: Sequence[str], who: str) -> list[Place]:
    """The selected feed-forwards, each a module of its own now."""
    return [isolate(graph, each) for each in selected(graph, patterns, who)]


def check_sampling(who: str, samples: int, rows: int) -> None:
    """Raise DitqError for numbers of calls and tokens that nothing can be fitted to."""
    for key, value, least in (("samples", samples, 1), ("rows", rows, 16)):
        if value < least:
            raise DitqError(f"pass '{who}': {key} is {value}, must be {least} or more")


def teaching_batches(context: Context, samples: int) -> list[CallBatch]:
    """Recorded calls of the conditions that the gate does not judge by."""
    trajectories = context.trajectories()
    return sampled_batches(trajectories, samples, 8, context.seed, teaching_conditions(trajectories))


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a feed-forward gets, and what it makes of it: tokens x [M, D], hidden channels a [M, H], output y [M, O], how much
    each token counts [M], and which of them judge what is fitted on the others; `weight` [O, H] of the output linear.
    """

    x: Tensor
    a: Tensor
    y: Tensor
    counts: Tensor
    judges: Tensor
    weight: Tensor

    @property
    def lessons(self) -> Tensor:
        return ~self.judges

    @property
    def mean(self) -> Tensor:
        """Of the hidden channels: [H], float32."""
        return weighted_mean(self.a[self.lessons], self.counts[self.lessons]).float()

    def error(self, made: Tensor) -> float:
        """Relative error of what was made of the judging tokens."""
        w, wanted = self.counts[self.judges].double(), self.y[self.judges].double()
        lost = (made.double() - wanted).square().sum(dim=1) @ w
        return float(lost / (wanted.square().sum(dim=1) @ w).clamp_min(1e-30))


def tokens_of_places(
    model: nn.Module,
    places: Sequence[Place],
    batches: Sequence[CallBatch],
    rows: int,
    weighting: str,
    context: Context,
) -> Iterator[tuple[Place, Tokens]]:
    """About `rows` tokens that each of the feed-forwards gets, evenly from all the calls.

    With `weighting: answer` a token counts as much as its output moves the model's answer: ||d<f, r> / dy||^2, r random signs,
    whose expectation is the squared effect of a small error there. The calls are run as often as it takes to keep no more
    than a few GB.

    Raises:
        DitqError: none of the calls runs the block of one of them.
    """
    width = max(linear_of(model.get_submodule(p.module), p.form.inputs[0]).in_features for p in places)
    rows = max(rows, 4 * max(place.form.hidden for place in places))
    at_once = max(1, MEMORY // (4 * rows * width))
    samples = sum(batch_size(batch.arguments) for batch in batches)
    for start in range(0, len(places), at_once):
        some = {
            place.module: _Watch(place.module, rows / samples, context.seed)
            for place in places[start : start + at_once]
        }
        hooks = [model.get_submodule(name).register_forward_hook(watch) for name, watch in some.items()]
        generator = torch.Generator().manual_seed(context.seed)
        try:
            for batch in context.track("tokens of feed-forwards", batches):
                if weighting == "none":
                    with torch.no_grad():
                        call(model, batch)
                else:
                    with torch.enable_grad():
                        _send_back(call(model, batch)[0], generator)
                for watch in some.values():
                    watch.keep()
        finally:
            for hook in hooks:
                hook.remove()
        for place in places[start : start + at_once]:
            watch = some.pop(place.module)
            if not watch.kept:
                raise DitqError(
                    f"{place.name}: its block runs at none of the timesteps of the recorded calls that were taken; "
                    "raise samples"
                )
            yield place, _tokens(model, place, torch.cat(watch.kept), torch.cat(watch.counts))


def _send_back(answer: Tensor, generator: torch.Generator) -> None:
    """The gradient of <answer, r>, r random signs, to what asks for it: nothing does where none of the blocks ran."""
    signs = torch.randint(0, 2, answer.shape, generator=generator).to(answer) * 2 - 1
    if answer.requires_grad:
        (answer * signs).sum().backward()


class _Watch:
    """Forward hook of a feed-forward: takes rows of what it gets, and what the gradient of its output says of them."""

    def __init__(self, name: str, rows_a_sample: float, seed: int) -> None:
        self.name, self.rows_a_sample, self.seed = name, rows_a_sample, seed
        self.kept: list[Tensor] = []
        self.counts: list[Tensor] = []
        self._given: tuple[Tensor, Tensor] | None = None

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        probe = torch.zeros_like(y, requires_grad=torch.is_grad_enabled())
        self._given = (inputs[0].detach(), probe)
        return y + probe if probe.requires_grad else y

    def keep(self) -> None:
        if self._given is None:  # its block does not run at this batch's timesteps
            return
        x, probe = self._given
        rows = x.reshape(-1, x.shape[-1])
        count = min(len(rows), math.ceil(self.rows_a_sample * x.shape[0]))
        generator = torch.Generator().manual_seed(self.seed + len(self.kept))
        chosen = torch.randperm(len(rows), generator=generator)[:count].to(x.device)
        self.kept.append(rows[chosen].float().cpu())
        weights = torch.ones(count)
        if probe.grad is not None:
            weights = probe.grad.reshape(len(rows), -1)[chosen].float().square().sum(dim=1).cpu()
        self.counts.append(weights)
        self._given = None


def _tokens(model: nn.Module, place: Place, x: Tensor, counts: Tensor) -> Tokens:
    a, weight, y = hidden_and_output(model, place, x)
    judges = torch.arange(len(x)) % HELD_OUT == 0
    # behind a gate that lets nothing through no token counts more than another
    mean = counts.mean()
    counts = counts / mean if mean > torch.finfo(mean.dtype).tiny else torch.ones_like(counts)
    return Tokens(x, a, y, counts, judges, weight)


def taylor_importances(
    model: nn.Module, places: Sequence[Place], batches: Sequence[CallBatch], context: Context
) -> dict[str, Tensor]:
    """How far the model's answer moves, to first order, where a hidden channel becomes its mean: [H] by module.

    With a factor alpha_j of the channel's difference from its mean, sum over samples of (d <f, r> / d alpha_j)^2, r random
    signs, whose expectation is ||df / d alpha_j||^2. (Taylor importance of a loss that is at its minimum would be 0.)
    """
    sums = {place.module: torch.zeros(place.form.hidden, dtype=torch.float64) for place in places}
    some = batches[:: max(1, len(batches) // PROBED)][:PROBED]
    generator = torch.Generator().manual_seed(context.seed)
    for batch in context.track("taylor importance", some):
        scaled = {place.module: _Scaled() for place in places}
        hooks = [
            linear_of(model.get_submodule(p.module), p.form.output).register_forward_pre_hook(scaled[p.module])
            for p in places
        ]
        try:
            with torch.enable_grad():
                _send_back(call(model, batch)[0], generator)
        finally:
            for hook in hooks:
                hook.remove()
        for name, scale in scaled.items():
            sums[name] += scale.squares()
    return sums


class _Scaled:
    """Forward pre-hook of an output linear: a factor of 1 on each sample's channels' differences from their mean."""

    def __init__(self) -> None:
        self.factor: Tensor | None = None

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = inputs[0]
        mean = hidden.detach().mean(dim=tuple(range(hidden.dim() - 1)), keepdim=True)
        self.factor = torch.ones_like(hidden[:, :1]).requires_grad_()
        return (mean + (hidden - mean) * self.factor,)

    def squares(self) -> Tensor:
        """Sum over the samples of the factor's squared gradient: float64 [H]; 0 where its block did not run."""
        if self.factor is None:
            return torch.zeros(())
        assert self.factor.grad is not None
        return self.factor.grad.double().square().sum(dim=tuple(range(self.factor.dim() - 1))).cpu()


def importance_of(
    kind: str, place: Place, tokens: Tokens, keep: int, taylor: Mapping[str, Tensor], seed: int
) -> Tensor:
    """One figure a hidden channel, large for those to keep: [H]."""
    if kind == "taylor":
        return taylor[place.module]
    if kind == "random":
        return torch.randperm(place.form.hidden, generator=torch.Generator().manual_seed(seed)).double()
    covariance = covariance_of(tokens.a[tokens.lessons], tokens.counts[tokens.lessons])
    if kind == "activation":
        return activation_importance(covariance, tokens.weight)
    return needed_importance(covariance, tokens.weight, keep)


def hidden_and_output(model: nn.Module, place: Place, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden channels [M, H], the output linear's weight [O, H], the output [M, O]) for tokens x [M, D]; float32."""
    module = model.get_submodule(place.module)
    dtype = linear_of(module, place.form.output).weight.dtype
    with torch.no_grad():
        parts = [hidden_of(module, place.form, part.to(dtype)[None])[0].float() for part in x.split(4096)]
        a = torch.cat(parts)
        linear = linear_of(module, place.form.output)
        y = nn.functional.linear(a, linear.weight.float(), None if linear.bias is None else linear.bias.float())
    return a, linear.weight.detach().float(), y
