"""A mixture of experts on a GPU: each linear of its experts is one kernel for all of them.

    router in float32 -> who answers whom -> for each linear of the feed-forward one product of all experts -> look-up

The first linears read the tokens themselves: these are rounded once, for the shared expert as well, and the kernel looks up
the rows of each slot as it loads them. What follows them, activation and rounding, is done for all slots at once. Answers are
looked up and added as MixtureOfExperts does it, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.kernels.fast_linear import FastLinear
from ditq.kernels.operators import experts_product
from ditq.kernels.storage import stack, why_not_stacked
from ditq.nn.structural.experts import MixtureOfExperts
from ditq.numerics.routing import Routes, route, slots_of


class Slots:
    """Which rows the linears of the experts read in the call that runs, int32 [samples E, C], -1 where a slot is not used.

    tokens: of the tokens of all samples; own: of what the linear before made for the slots.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.own: Tensor | None = None


def why_separate(layers: Sequence[nn.Module]) -> str | None:
    """Why these linears, one of each expert, cannot be one kernel, or None."""
    fast = [layer for layer in layers if isinstance(layer, FastLinear)]
    if len(fast) < len(layers):
        return "not all of their linears are quantized"
    if any(layer.up is not None for layer in fast):
        return "they have low-rank branches"
    if any(layer.input.plan is not fast[0].input.plan for layer in fast):
        return "their inputs are transformed or rounded differently"
    if any(layer.input.transform is not None for layer in fast):
        return "their inputs have a transform that only torch computes"
    if len({layer.bias is None for layer in fast}) > 1:
        return "only some have a bias"
    return why_not_stacked([layer.stored for layer in fast])


class ExpertLinears(nn.Module):
    """The linear that stands at one place in all experts: rows of x for each slot, [.., K] -> [samples E C, N].

    reads_tokens: whether x has the tokens of all samples, or what was made for the slots.
    """

    def __init__(self, layers: Sequence[nn.Module], slots: Slots, reads_tokens: bool) -> None:
        super().__init__()
        if reason := why_separate(layers):
            raise ValueError(reason)
        fast = [layer for layer in layers if isinstance(layer, FastLinear)]
        self.experts, self.slots, self.reads_tokens = len(fast), slots, reads_tokens
        self.stored = stack([layer.stored for layer in fast])
        biases = [layer.bias for layer in fast if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.input = fast[0].input

    def _apply(self, fn: object, recurse: bool = True) -> ExpertLinears:
        return self  # as FastLinear

    def forward(self, x: Tensor) -> Tensor:
        q, scales, _ = self.input(x)
        chosen = self.slots.tokens if self.reads_tokens else self.slots.own
        assert chosen is not None
        w = self.stored
        return experts_product(
            q, scales, w.data, w.tables, w.multiplier, w.scale, self.bias, chosen, self.experts, w.rows, w.columns,
            w.bits, w.run, w.group, w.float8, x.dtype,
        )  # fmt: skip


class Float32Router(nn.Module):
    """The scores of a mixture, in float32 whatever the model around it computes in, so that near ties are decided as meant."""

    def __init__(self, mixture: MixtureOfExperts, device: torch.device) -> None:
        super().__init__()
        self.router = mixture.router.to(device, torch.float32)
        self.balance = mixture.balance.to(device, torch.float32)

    def _apply(self, fn: object, recurse: bool = True) -> Float32Router:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x.float()) + self.balance


class FastMixture(nn.Module):
    """What stands in a MixtureOfExperts' place, whose linears are FastLinears already.

    why_separate: why each expert has kernels of its own; None where one is for all.
    """

    def __init__(self, mixture: MixtureOfExperts, device: torch.device) -> None:
        super().__init__()
        self.shared, self.router = mixture.shared, Float32Router(mixture, device)
        self.experts, self.top, self.capacity = len(mixture.experts), mixture.top, mixture.capacity
        self.choice, self.slots = mixture.choice, Slots()
        form = mixture.form
        places = {
            name: [expert.get_submodule(name) for expert in mixture.experts] for name in (*form.inputs, form.output)
        }
        reasons = (why_separate(layers) for layers in places.values())
        self.why_separate = next((reason for reason in reasons if reason), None)
        self.separate, self.joint = None, None
        if self.why_separate:
            self.separate = mixture.experts
            return
        self.joint = mixture.experts[0]
        for name, layers in places.items():
            self.joint.set_submodule(name, ExpertLinears(layers, self.slots, reads_tokens=name in form.inputs))

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        y, scores = self.shared(x), self.router(x)
        slots = slots_of(tokens, self.experts, self.top, self.capacity)
        routes = route(scores, self.top, slots, self.choice)
        answers = self._made(x, routes)
        last = self.experts * slots
        first = torch.arange(samples, device=x.device)[:, None, None] * last
        places = routes.answers()
        there, rows = places < last, first + places.clamp_max(last - 1)
        for each, answered in zip(rows.unbind(2), there.unbind(2), strict=True):
            y = y + torch.where(answered[..., None], F.embedding(each, answers), 0)
        return y

    def _made(self, x: Tensor, routes: Routes) -> Tensor:
        """What the experts make of the tokens in their slots [samples E C, D]."""
        rows = routes.rows()
        if self.separate is not None:
            lines = x.reshape(-1, x.shape[-1])
            made = [expert(F.embedding(row, lines)) for expert, row in zip(self.separate, rows.unbind(1), strict=True)]
            return torch.stack(made, dim=1).flatten(0, 2)
        assert self.joint is not None
        chosen = rows if routes.used is None else torch.where(routes.used, rows, -1)
        chosen = chosen.flatten(0, 1).to(torch.int32)
        every = torch.arange(chosen.numel(), dtype=torch.int32, device=x.device).view(chosen.shape)
        self.slots.tokens, self.slots.own = chosen, torch.where(chosen < 0, -1, every)
        answers = self.joint(x)
        self.slots.tokens = self.slots.own = None
        return answers
