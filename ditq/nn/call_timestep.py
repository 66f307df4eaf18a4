"""Which timestep a call of the model is for: told to the layers whose input has a scale for each timestep bin."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

from ditq.nn.quant_linear import QuantLinear

ARGUMENT = "timestep"
_MARK = "ditq_tells_its_timestep"


def tell_timestep(model: nn.Module, timestep: Tensor) -> None:
    """Let the quantized layers of `model` take the scales of this timestep, [B] or []; of a batch, its first sample's."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.activation.granularity == "timestep" and not layer.exporting:
            layer.timestep = timestep


def tell_at_each_call(model: nn.Module) -> None:
    """From now on every call of `model` tells its layers the timestep that it is for. A second time changes nothing.

    Raises:
        ValueError: the model's forward has no argument `timestep`.
    """
    if getattr(model, _MARK, False):
        return
    names = list(signature(model.forward).parameters)
    if ARGUMENT not in names:
        raise ValueError(f"{type(model).__name__} has no argument called {ARGUMENT}")
    position = names.index(ARGUMENT)

    def tell(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        timestep = keywords[ARGUMENT] if ARGUMENT in keywords else arguments[position]
        tell_timestep(model, timestep)

    setattr(model, _MARK, True)
    model.register_forward_pre_hook(tell, with_kwargs=True)
