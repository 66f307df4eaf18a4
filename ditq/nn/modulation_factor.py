"""Per-block factors on a modulation vector that all blocks share (adaLN-single), so that scales can be folded a block.

With m = table + f * shared, a block's own scale and shift become anything linear in the shared vector at the price of one
multiply of [batch, rows * width] values, never of tokens.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

ATTRIBUTE = "modulation_factor"


class ModulationFactor(nn.Module):
    """shared [batch, rows * width] or [batch, rows, width] -> shared * factor, factor [rows, width]."""

    factor: Tensor

    def __init__(self, rows: int, width: int, argument: str) -> None:
        super().__init__()
        self.argument = argument
        self.register_buffer("factor", torch.ones(rows, width))

    def forward(self, shared: Tensor) -> Tensor:
        rows, width = self.factor.shape
        scaled = shared.reshape(shared.shape[0], rows, width) * self.factor.to(shared.dtype)
        return scaled.reshape(shared.shape)

    def spec(self) -> dict[str, Any]:
        return {"rows": self.factor.shape[0], "width": self.factor.shape[1], "argument": self.argument}


def attach(block: nn.Module, rows: int, width: int, argument: str) -> ModulationFactor:
    """The block's factor, added (as ones, and a hook that applies it to `argument`) if it has none yet."""
    present = getattr(block, ATTRIBUTE, None)
    if isinstance(present, ModulationFactor):
        return present
    factor = ModulationFactor(rows, width, argument)
    position = list(signature(block.forward).parameters).index(argument)

    def scale_argument(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        factor = getattr(module, ATTRIBUTE)  # the module's own, which a copy of it has a copy of
        if argument in keywords:
            return arguments, {**keywords, argument: factor(keywords[argument])}
        return (*arguments[:position], factor(arguments[position]), *arguments[position + 1 :]), keywords

    block.add_module(ATTRIBUTE, factor)
    block.register_forward_pre_hook(scale_argument, with_kwargs=True)
    return factor
