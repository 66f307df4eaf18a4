"""A feed-forward with fewer hidden channels than it had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.sliced import FeedForwardForm, linear_of, sliced
from ditq.nn.structural import StructuralPart, register


@register
class PrunedFeedForward(StructuralPart):
    """y = feed_forward(x) with `width` of the hidden channels."""

    kind: ClassVar[str] = "pruned_feed_forward"

    def __init__(self, feed_forward: nn.Module, form: FeedForwardForm, width: int) -> None:
        super().__init__()
        self.feed_forward, self.form, self.width = feed_forward, form, width

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x)

    def spec(self) -> dict[str, Any]:
        return {"form": self.form.spec(), "width": self.width}

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        form, dense = FeedForwardForm.from_spec(spec["form"]), model.get_submodule(place)
        inner = sliced(dense, form, torch.arange(spec["width"]))
        output = linear_of(inner, form.output)
        output.bias = nn.Parameter(torch.zeros(output.out_features), requires_grad=False)
        model.set_submodule(place, cls(inner, form, spec["width"]))
