"""A feed-forward with some of the hidden channels of another: the same module, with rows and columns of its linears."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FeedForwardForm:
    """Which linears of a feed-forward module make its hidden channels, and which reads them, as paths inside the module.

    Gated forms (GEGLU, SwiGLU) make each hidden channel of several rows: of two linears, or of the two halves of one.
    """

    inputs: tuple[str, ...]
    output: str
    hidden: int

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> FeedForwardForm:
        return cls(tuple(spec["inputs"]), spec["output"], spec["hidden"])

    def spec(self) -> dict[str, Any]:
        return {**asdict(self), "inputs": list(self.inputs)}


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """The linear at a path inside a module.

    Raises:
        TypeError: something else stands there.
    """
    found = module.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise TypeError(f"{name} is no linear but a {type(found).__name__}")
    return found


def sliced(module: nn.Module, form: FeedForwardForm, channels: Tensor) -> nn.Module:
    """A copy of the feed-forward with these hidden channels only; its output linear keeps no bias of its own."""
    memo: dict[int, Any] = {}
    for name in form.inputs:
        linear = linear_of(module, name)
        rows = torch.cat([channels + start for start in range(0, linear.out_features, form.hidden)])
        memo[id(linear)] = _linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    output = linear_of(module, form.output)
    memo[id(output)] = _linear(output.weight[:, channels], None)
    return copy.deepcopy(module, memo)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def hidden_of(module: nn.Module, form: FeedForwardForm, x: Tensor) -> Tensor:
    """The hidden channels [.., H] that a feed-forward makes of x [.., D]."""
    found: list[Tensor] = []
    hook = linear_of(module, form.output).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        module(x)
    finally:
        hook.remove()
    return found[0]


def set_output(module: nn.Module, form: FeedForwardForm, weight: Tensor, bias: Tensor | None) -> None:
    """Give the output linear another weight [O, H], and a bias or none, in its own dtype."""
    linear = linear_of(module, form.output)
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
    given = None if bias is None else nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    linear.register_parameter("bias", given)
