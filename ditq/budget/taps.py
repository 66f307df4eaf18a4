"""Inputs and outputs of linears in one call of the denoiser, and where its derivative by those outputs is found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Tap:
    """Input and output of one linear in one call, and a zero added to the output whose derivative is that by the output."""

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.made: Tensor | None = None
        self.zero: Tensor | None = None

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.given, self.made = inputs[0].detach(), output.detach()
        self.zero = torch.zeros_like(output).requires_grad_()
        return output + self.zero


@contextmanager
def tapped(modules: Sequence[nn.Module]) -> Iterator[list[Tap]]:
    """Within it each module's next call leaves what it got and gave in its tap."""
    taps = [Tap() for _ in modules]
    handles = [module.register_forward_hook(tap) for module, tap in zip(modules, taps, strict=True)]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
