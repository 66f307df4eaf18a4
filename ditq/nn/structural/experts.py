"""A mixture of experts in the place of a feed-forward: one shared expert for all tokens, routed experts for some each.

Everything has a fixed size for a given number of tokens: each expert has C slots for the tokens of a sample, and what it
makes is gathered back, never scattered with a sum. So the same form runs under torch, ONNX Runtime and TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ditq.nn.sliced import FeedForwardForm, linear_of, sliced
from ditq.nn.structural import StructuralPart, register
from ditq.numerics.routing import FINENESS, Routes, route, slots_of


class RepresentativeRouter(nn.Module):
    """|hidden channels| of a few channels of the dense feed-forward, one for each expert."""

    def __init__(self, channels: nn.Module) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x).abs()


@register
class MixtureOfExperts(StructuralPart):
    """y = shared(x) + sum of the chosen experts e of expert_e(x), x [B, N, D].

    With `choice: token` each token asks the `top` experts of the highest scores, and each expert answers those of the
    highest score among the tokens that ask it, as many as it has slots for; with `choice: expert` each expert answers the
    tokens of the highest scores whoever asked, so every slot is used, and a token may get more experts or fewer.

    Slots of an expert: ceil(N top capacity / E). What an expert makes is the difference from its mean output, which is in the
    shared expert's bias, so that a token without it gets the mean. Where gradients are made in training, the chosen experts'
    outputs carry one to the router through a gate that is 1 (a straight-through softmax).

    Sources: Dense2MoE (arXiv 2510.09094), expert choice (Zhou et al., arXiv 2202.09368).
    """

    kind: ClassVar[str] = "mixture_of_experts"

    def __init__(
        self,
        shared: nn.Module,
        experts: Sequence[nn.Module],
        router: nn.Module,
        form: FeedForwardForm,
        *,
        top: int,
        capacity: float,
        choice: str,
    ) -> None:
        super().__init__()
        self.shared, self.experts, self.router = shared, nn.ModuleList(experts), router
        self.balance = nn.Parameter(torch.zeros(len(experts)), requires_grad=False)
        self.form, self.top, self.choice = form, top, choice
        self.width = linear_of(experts[0], form.output).in_features
        self.capacity = min(round(capacity * FINENESS), len(experts) * FINENESS // top)
        self._balance_loss: Tensor | None = None
        self.chosen: list[Tensor] | None = (
            None  # where a list is put here, each forward adds who answers whom [B, E, N]
        )

    def slots(self, tokens: int) -> int:
        """Tokens of a sample that one expert answers at most."""
        return slots_of(tokens, len(self.experts), self.top, self.capacity)

    def scores(self, x: Tensor) -> Tensor:
        """[B, N, E]."""
        return self.router(x) + self.balance

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        slots = self.slots(tokens)
        y, scores = self.shared(x), self.scores(x)
        routes = route(scores, self.top, slots, self.choice)
        # Embedding is the lookup of rows: one operator in every runtime, which reads nothing twice.
        rows, lines = routes.rows(), x.reshape(-1, width)
        if self.training and torch.is_grad_enabled():
            made = [(self._made_at_once(rows, lines) * self._gate(scores, routes)[..., None]).flatten(1, 2)]
        else:
            made = [expert(F.embedding(row, lines)) for expert, row in zip(self.experts, rows.unbind(1), strict=True)]
        nothing = torch.zeros_like(y[:, :1])
        answers = torch.cat([*made, nothing], dim=1).reshape(-1, width)  # of a sample E C + 1
        last = len(self.experts) * slots
        if self.chosen is not None:
            self.chosen.append((routes.place < last).detach())
        first = torch.arange(samples, device=x.device)[:, None, None] * (last + 1)
        for each in (routes.answers() + first).unbind(2):
            y = y + F.embedding(each, answers)
        return y

    def _made_at_once(self, rows: Tensor, lines: Tensor) -> Tensor:
        """What all experts make of their rows of x, in few large operators, as a GPU needs it to learn fast: [B, E, C, O]."""
        weights = {
            name: torch.stack([expert.get_parameter(name) for expert in self.experts])
            for name, _ in self.experts[0].named_parameters()
        }
        given = F.embedding(rows.transpose(0, 1).flatten(1), lines)  # [E, B C, D]
        made = torch.vmap(lambda own, x: functional_call(self.experts[0], own, (x,)))(weights, given)
        return made.unflatten(1, (len(rows), -1)).transpose(0, 1)

    def _gate(self, scores: Tensor, routes: Routes) -> Tensor:
        """Ones [B, E, C] with a gradient to the router; notes how unequal the load is."""
        share, count = scores.softmax(dim=-1), len(self.experts)
        asked = routes.asked[..., None] == torch.arange(count, device=scores.device)
        load = asked.to(share).mean(dim=(0, 1, 2))
        self._balance_loss = count * (load * share.mean(dim=(0, 1))).sum() - 1
        gate = share.transpose(1, 2).gather(2, routes.token)
        return 1 + gate - gate.detach()

    def auxiliary_loss(self) -> Tensor | None:
        """E sum_e f_e P_e - 1 of the last forward in training (Fedus et al., arXiv 2101.03961, eq. 4): 0 for equal loads.

        Given once, so that the mixture holds no graph of gradients.
        """
        loss, self._balance_loss = self._balance_loss, None
        return loss

    def alike(self) -> list[list[str]]:
        return [[f"experts.{number}.{self.form.output}" for number in range(len(self.experts))]]

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form.spec(),
            "experts": len(self.experts),
            "width": self.width,
            "router": "representative" if isinstance(self.router, RepresentativeRouter) else "linear",
            "top": self.top,
            "capacity": self.capacity / FINENESS,
            "choice": self.choice,
        }

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        form = FeedForwardForm.from_spec(spec["form"])
        shared = form.hidden - spec["experts"] * spec["width"]
        if shared < 0 or linear_of(model.get_submodule(place), form.output).in_features != form.hidden:
            raise ValueError(f"{place} has not as many hidden channels as its experts")
        parts = torch.arange(shared, form.hidden).reshape(spec["experts"], spec["width"])
        representatives = parts[:, 0] if spec["router"] == "representative" else None
        model.set_submodule(
            place,
            divided(
                model.get_submodule(place),
                form,
                torch.arange(shared),
                parts,
                representatives,
                **{key: spec[key] for key in ("top", "capacity", "choice")},
            ),
        )


def divided(
    dense: nn.Module,
    form: FeedForwardForm,
    shared: Tensor,
    parts: Tensor,
    representatives: Tensor | None = None,
    *,
    top: int,
    capacity: float,
    choice: str,
) -> MixtureOfExperts:
    """The dense feed-forward with its hidden channels divided: `shared` [S] for all tokens, a row of `parts` [E, W] an expert.

    The router is a linear with zero weights, or, given a channel of each expert [E], made of those channels. The shared expert
    has the dense bias, the experts biases of zero. With all experts chosen for all tokens it is the dense one, exactly.
    """
    output = linear_of(dense, form.output)
    zero = torch.zeros(output.out_features, dtype=output.weight.dtype)
    bias = zero if output.bias is None else output.bias.detach().clone()
    made = []
    for channels, own in ((shared, bias), *((part, zero.clone()) for part in parts)):
        made.append(sliced(dense, form, channels))
        linear_of(made[-1], form.output).bias = nn.Parameter(own, requires_grad=False)
    width = linear_of(dense, form.inputs[0]).in_features
    router: nn.Module = nn.Linear(width, len(parts), dtype=output.weight.dtype).requires_grad_(False)
    if representatives is None:
        nn.init.zeros_(router.weight)  # type: ignore[arg-type]
        nn.init.zeros_(router.bias)  # type: ignore[arg-type]
    else:
        channels_alone = sliced(dense, form, representatives)
        channels_alone.set_submodule(form.output, nn.Identity())
        router = RepresentativeRouter(channels_alone)
    mixture = MixtureOfExperts(made[0], made[1:], router, form, top=top, capacity=capacity, choice=choice)
    return mixture.train(dense.training)
