"""A linear as two thin ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.structural import StructuralPart, register


@register
class LowRankLinear(StructuralPart):
    """y = up(down(x)): [O, r] and [r, I] in the place of [O, I]; the bias is up's. Both are plain linears."""

    kind: ClassVar[str] = "low_rank_linear"

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    @classmethod
    def of(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """In the place of `linear`, of this rank, with a bias; the weights are yet to be set."""
        like: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        made = cls(nn.Linear(linear.in_features, rank, False, **like), nn.Linear(rank, linear.out_features, **like))
        return made.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def spec(self) -> dict[str, Any]:
        return {"rank": self.down.out_features}

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        linear = model.get_submodule(place)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(place, cls.of(linear, spec["rank"]))

    def set(self, down: Tensor, up: Tensor, bias: Tensor) -> None:
        """down [r, I], up [O, r], bias [O]."""
        with torch.no_grad():
            self.down.weight.copy_(down)
            self.up.weight.copy_(up)
            self.up.bias.copy_(bias)
