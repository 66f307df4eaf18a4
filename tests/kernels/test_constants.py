"""What a model computes on the CPU although it is on a GPU is copied there once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.kernels.constants import keep_constants
from tests.families_small import small_model


def test_chromas_guidance_is_copied_once_and_what_has_its_inputs_on_the_device_is_left_alone() -> None:
    model, there = small_model("chroma"), torch.device("meta")
    keep_constants(model, there)
    found = {}
    for name, part in model.named_modules():
        if name.endswith("guidance_proj"):
            found["same"], found["again"] = part(torch.tensor([0, 0])), part(torch.tensor([0, 0]))
            found["other"], found["device"] = part(torch.tensor([1, 1])), part(torch.zeros(2, device="meta"))
    assert {tensor.device for tensor in found.values()} == {there}
    assert found["same"] is found["again"]
    assert len({id(tensor) for tensor in found.values()}) == 3


def test_blocks_and_parts_with_weights_are_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.linear = nn.GELU(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.act(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList([Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.first(x))

    model, x = Model(), torch.randn(2, 4)
    keep_constants(model, torch.device("meta"))
    expected = F.linear(F.gelu(model.first(x)), model.blocks[0].linear.weight, model.blocks[0].linear.bias)  # type: ignore[union-attr, arg-type]
    assert torch.equal(model(x), expected)
