"""A linear in full precision behind an input transform: what stands at a site after `rotate` and before `quantize`."""

from __future__ import annotations

from torch import Tensor, nn

from ditq.nn.input_transform import InputTransform


class TransformedLinear(nn.Module):
    """y = linear(transform(x)); `linear` holds the weight already expressed in the transformed basis."""

    def __init__(self, linear: nn.Linear, transform: InputTransform) -> None:
        super().__init__()
        self.linear, self.transform = linear, transform

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.transform(x))
