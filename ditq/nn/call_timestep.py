"""Which timestep a call of the model is for: told to the parts that are not the same at all of them.

These are layers whose input has a scale for each bin of timesteps, and blocks that run in some bins only.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

from ditq.nn.quant_linear import QuantLinear
from ditq.nn.structural.scheduled_block import ScheduledBlock

ARGUMENT = "timestep"
_MARK = "ditq_tells_its_timestep"


def tell_timestep(model: nn.Module, timestep: Tensor) -> None:
    """Let the parts of `model` be what they are at this timestep, [B] or []; a quantized layer goes by the first sample's."""
    for part in model.modules():
        timed = isinstance(part, QuantLinear) and part.activation.granularity == "timestep" and not part.exporting
        if timed or isinstance(part, ScheduledBlock):
            part.timestep = timestep


def tell_at_each_call(model: nn.Module) -> None:
    """From now on every call of `model` tells its parts the timestep that it is for. A second time changes nothing.

    Raises:
        ValueError: the model's forward has no argument `timestep`.
    """
    if getattr(model, _MARK, False):
        return
    names = list(signature(model.forward).parameters)
    if ARGUMENT not in names:
        raise ValueError(f"{type(model).__name__} has no argument called {ARGUMENT}")
    position = names.index(ARGUMENT)

    def tell(called: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        timestep = keywords[ARGUMENT] if ARGUMENT in keywords else arguments[position]
        tell_timestep(called, timestep)  # a copy of the model has this hook too

    setattr(model, _MARK, True)
    model.register_forward_pre_hook(tell, with_kwargs=True)
