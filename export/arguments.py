"""Arguments of a transformer's forward as a flat dictionary of named tensors, and back.

A nested dictionary becomes dotted names: `added_cond_kwargs={"resolution": r}` is `added_cond_kwargs.resolution`. The
layout is the same nest with each tensor replaced by its name; it is plain JSON and is stored in engine.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditq.errors import DitqError

# argument -> {"tensor": flat name}, {"values": a nested layout} or {"constant": value}
Layout = dict[str, Any]


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], Layout]:
    """(tensors by flat name, layout).

    Raises:
        DitqError: an argument is neither a tensor, a number, a string, None, nor a dictionary of those.
    """
    tensors: dict[str, Tensor] = {}
    layout: Layout = {}
    for argument, value in arguments.items():
        name = f"{prefix}{argument}"
        if isinstance(value, Tensor):
            tensors[name] = value
            layout[argument] = {"tensor": name}
        elif isinstance(value, Mapping):
            inner, inner_layout = flatten(value, f"{name}.")
            tensors |= inner
            layout[argument] = {"values": inner_layout}
        elif value is None or isinstance(value, bool | int | float | str):
            layout[argument] = {"constant": value}
        else:
            raise DitqError(
                f"argument {name}: a {type(value).__name__} cannot be exported; give tensors or plain values"
            )
    return tensors, layout


def unflatten(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """The arguments that `flatten` took apart."""
    arguments: dict[str, Any] = {}
    for argument, part in layout.items():
        if "tensor" in part:
            arguments[argument] = tensors[part["tensor"]]
        elif "values" in part:
            arguments[argument] = unflatten(tensors, part["values"])
        else:
            arguments[argument] = part["constant"]
    return arguments
