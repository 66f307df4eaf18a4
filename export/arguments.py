"""Arguments of a transformer's forward as a flat dictionary of named tensors, and back.

What is nested becomes dotted names: `added_cond_kwargs={"resolution": r}` is `added_cond_kwargs.resolution`, and
`image_rotary_emb=(cos, sin)` is `image_rotary_emb.0` and `image_rotary_emb.1`. The layout is the same nest with each tensor
replaced by its name; it is plain JSON and is stored in engine.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditq.errors import DitqError

Part = dict[str, Any]
"""{"tensor": flat name}, {"constant": value}, {"values": a nested layout}, {"list" or "tuple": parts}, or {"repeated": a part,
"times": n}: a list of one thing without tensors, which pipelines repeat for each sample of the batch."""
Layout = dict[str, Part]
MOST_REPEATS = 1 << 16  # samples of a batch: an engine.json that asks for more asks for memory only


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], Layout]:
    """(tensors by flat name, layout).

    Raises:
        DitqError: an argument is neither a tensor, a number, a string, None, nor a dictionary, list or tuple of those.
    """
    tensors: dict[str, Tensor] = {}
    layout = {argument: _taken_apart(value, f"{prefix}{argument}", tensors) for argument, value in arguments.items()}
    return tensors, layout


def _taken_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Part:
    """Its part of a layout; its tensors are put among `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"values": {key: _taken_apart(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"constant": value}
    if isinstance(value, list | tuple):
        before = len(tensors)
        parts = [_taken_apart(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": parts}
        alike = len(tensors) == before and all(part == parts[0] for part in parts)
        return {"repeated": parts[0], "times": len(parts)} if parts and alike else {"list": parts}
    raise DitqError(f"argument {name}: a {type(value).__name__} cannot be exported; give tensors or plain values")


def unflatten(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """The arguments that `flatten` took apart."""
    return {argument: _put_together(part, tensors) for argument, part in layout.items()}


def is_part(part: Any) -> bool:
    """Whether it describes one argument, as `flatten` does."""
    if not isinstance(part, dict):
        return False
    if "tensor" in part:
        return isinstance(part["tensor"], str)
    if "values" in part:
        return isinstance(part["values"], dict) and all(map(is_part, part["values"].values()))
    for several in ("list", "tuple"):
        if several in part:
            return isinstance(part[several], list) and all(map(is_part, part[several]))
    if "repeated" in part:
        times = part.get("times")
        return is_part(part["repeated"]) and isinstance(times, int) and 1 <= times <= MOST_REPEATS
    return "constant" in part


def _put_together(part: Part, tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in part:
        return tensors[part["tensor"]]
    if "values" in part:
        return unflatten(tensors, part["values"])
    if "list" in part:
        return [_put_together(item, tensors) for item in part["list"]]
    if "tuple" in part:
        return tuple(_put_together(item, tensors) for item in part["tuple"])
    if "repeated" in part:
        return [_put_together(part["repeated"], tensors)] * part["times"]
    return part["constant"]


def collect(given: Mapping[str, Any], layout: Layout, engine: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors by flat name of a call of the engine of that name and layout.

    Raises:
        DitqError: a value that the engine was not compiled with. What it does not take must be absent or empty.
    """
    tensors: dict[str, Tensor] = {}
    for argument, part in layout.items():
        if argument in given or "constant" not in part:
            _collect(given.get(argument), part, engine, f"{prefix}{argument}", tensors)
    for argument, value in given.items():
        if argument not in layout and not _is_empty(value):
            raise DitqError(f"{engine}: was compiled without '{prefix}{argument}', so it cannot be given")
    return tensors


def _collect(value: Any, part: Part, engine: str, name: str, tensors: dict[str, Tensor]) -> None:
    if "tensor" in part:
        if not isinstance(value, Tensor):
            raise DitqError(f"{engine}: argument '{name}' must be a tensor, not {type(value).__name__}")
        tensors[name] = value
    elif "values" in part:
        tensors |= collect(value if isinstance(value, Mapping) else {}, part["values"], engine, f"{name}.")
    elif "constant" in part:
        several = isinstance(value, Tensor) and value.numel() != 1  # which no comparison would call equal or not
        if several or (not (_is_empty(value) and _is_empty(part["constant"])) and value != part["constant"]):
            made_with = f"was compiled with '{name}' = {part['constant']!r}"
            raise DitqError(f"{engine}: {made_with}; it cannot take another value")
    else:
        parts = part.get("list", part.get("tuple"))
        if not isinstance(value, list | tuple) or (parts is not None and len(parts) != len(value)):
            wanted = "a list" if parts is None else f"a list of {len(parts)} values"
            raise DitqError(f"{engine}: argument '{name}' must be {wanted}, as it was compiled with")
        for place, item in enumerate(value):
            _collect(item, part["repeated"] if parts is None else parts[place], engine, f"{name}.{place}", tensors)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Mapping | list | tuple) and not value)
