"""A feed-forward that shares its output linear with an attention, as in FLUX's single blocks, made a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.sliced import FeedForwardForm, linear_of
from ditq.nn.structural import StructuralPart, register


class FeedForwardOfBlock(nn.Module):
    """linear_out(activation(linear_in(x)))."""

    def __init__(self, linear_in: nn.Linear, activation: nn.Module, linear_out: nn.Linear) -> None:
        super().__init__()
        self.linear_in, self.activation, self.linear_out = linear_in, activation, linear_out

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(self.activation(self.linear_in(x)))

    def form(self) -> FeedForwardForm:
        return FeedForwardForm(("linear_in",), "linear_out", self.linear_out.in_features)


@register
class SeparateFeedForward(StructuralPart):
    """Stands in the place of the output linear: y = other(z) + f, where the input is z and f side by side.

    The feed-forward, with its own part of the output linear, stands in the place of its input linear and makes f; the
    activation between them has become an identity. Exact. Only where the hidden channels are the last ones of the linear's
    input.
    """

    kind: ClassVar[str] = "separate_feed_forward"
    same_input: ClassVar[bool] = False
    first: ClassVar[bool] = True

    def __init__(self, other: nn.Linear, linear_in: str, activation: str) -> None:
        super().__init__()
        self.other, self.linear_in, self.activation = other, linear_in, activation
        self.widths = [other.in_features, other.out_features]

    def forward(self, x: Tensor) -> Tensor:
        z, made = x.split(self.widths, dim=-1)
        return self.other(z) + made

    def spec(self) -> dict[str, Any]:
        return {"linear_in": self.linear_in, "activation": self.activation, "split": self.widths[0]}

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        joint, linear_in = linear_of(model, place), linear_of(model, spec["linear_in"])
        activation, split = model.get_submodule(spec["activation"]), spec["split"]
        other = nn.Linear(split, joint.out_features, joint.bias is not None, device="meta")
        other.weight = nn.Parameter(joint.weight[:, :split].detach().clone(), requires_grad=False)
        if joint.bias is not None:
            other.bias = nn.Parameter(joint.bias.detach().clone(), requires_grad=False)
        out = nn.Linear(joint.in_features - split, joint.out_features, device="meta")
        out.weight = nn.Parameter(joint.weight[:, split:].detach().clone(), requires_grad=False)
        out.bias = nn.Parameter(torch.zeros_like(joint.weight[:, 0]), requires_grad=False)
        made: dict[str, nn.Module] = {
            place: cls(other, spec["linear_in"], spec["activation"]),
            spec["linear_in"]: FeedForwardOfBlock(linear_in, activation, out),
            spec["activation"]: nn.Identity(),
        }
        for name, module in made.items():
            model.set_submodule(name, module.train(joint.training))
