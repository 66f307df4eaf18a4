"""Describe what the passes put into a model, and put the same structure into a fresh one, for loading an engine's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditq.nn import attention_rounding
from ditq.nn.attention_rounding import AttentionRounding
from ditq.nn.call_timestep import tell_at_each_call
from ditq.nn.input_transform import InputTransform
from ditq.nn.modulation_factor import ATTRIBUTE, ModulationFactor, attach
from ditq.nn.quant_linear import QuantLinear
from ditq.nn.structural import describe_parts, install_parts
from ditq.nn.transformed_linear import TransformedLinear
from ditq.numerics.attention_rounding import AttentionFormat
from ditq.numerics.packing import packed_shape


def describe(model: nn.Module) -> dict[str, Any]:
    """JSON: every part of `model` that a pass has put in the place of the original one, by module path."""
    quantized, transformed, factors, attentions, biased = {}, {}, {}, {}, []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            quantized[name] = module.spec()
        elif isinstance(module, TransformedLinear):
            transformed[name] = module.transform.spec()
        elif isinstance(module, ModulationFactor):
            factors[name.rpartition(".")[0]] = module.spec()
        elif isinstance(module, AttentionRounding):
            attentions[module.site] = module.spec()
        elif isinstance(module, nn.Linear) and module.bias is not None:
            biased.append(name)
    return {
        "structural": describe_parts(model),
        "quantized": quantized,
        "transformed": transformed,
        "factors": factors,
        "attentions": attentions,
        "biased": biased,
    }


def rebuild(model: nn.Module, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Give `model` the structure of `described` and the tensors of `state`, in place.

    Raises:
        RuntimeError: `state` does not fit. What is made in a described size is compared first: an engine.json that lies about
            it costs no memory.
    """
    tensors = dict(state)
    install_parts(model, described.get("structural", []))  # absent in engines from before there were such
    for name, spec in described["transformed"].items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _check_transform(f"{name}.transform.", spec, _stored(tensors, f"{name}.linear.weight").shape[1], tensors)
        transform = InputTransform.from_spec(spec, tensors, f"{name}.transform.")
        model.set_submodule(name, TransformedLinear(linear, transform))
    for name, spec in described["quantized"].items():
        _check_linear(name, spec, tensors)
        model.set_submodule(name, QuantLinear.from_spec(spec, tensors))
    for name, spec in described["factors"].items():
        _check(tensors, f"{name}.{ATTRIBUTE}.factor", (spec["rows"], spec["width"]))
        attach(model.get_submodule(name), **spec)
    for name, spec in described.get("attentions", {}).items():  # absent in engines from before there were such
        attention_rounding.attach(model.get_submodule(name), name, AttentionFormat(**spec))
    for name in described["biased"]:
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and linear.bias is None:
            _check(tensors, f"{name}.bias", (linear.out_features,))
            linear.bias = nn.Parameter(torch.zeros(linear.out_features), requires_grad=False)
    if any(spec["activation"]["granularity"] == "timestep" for spec in described["quantized"].values()):
        tell_at_each_call(model)
    model.load_state_dict(tensors, assign=True)


def _check_linear(name: str, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where the sizes of a QuantLinear's description are not those of its tensors."""
    rows, columns, rank = spec["out_features"], spec["in_features"], spec.get("rank", 0)
    _check(tensors, f"{name}.codes", packed_shape(rows, columns, spec["bits"]))
    for part in ("table", "scale", "multiplier"):
        if spec[part]:
            _check(tensors, f"{name}.{part}", spec[part])
    if rank:
        _check(tensors, f"{name}.down", (rank, columns))
    if spec["transform"]:
        _check_transform(f"{name}.transform.", spec["transform"], columns, tensors)


def _check_transform(prefix: str, spec: Mapping[str, Any], width: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where a transform's description is not for inputs of that many channels."""
    for part, size in (("inverse_scale", spec["scaled"]), ("shift", spec["shifted"])):
        if size:
            _check(tensors, f"{prefix}{part}", (size,))
    for part in spec["rotations"]:
        start, stop, size = part["start"], part["stop"], part["rotation"]["size"]
        if not (0 <= start < stop <= width and size == stop - start):
            raise RuntimeError(f"{prefix}rotations: one of {size} channels, {start} to {stop}, in an input of {width}")


def _check(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> None:
    stored = list(_stored(tensors, name).shape)
    if stored != list(shape):
        raise RuntimeError(f"{name} is {stored} among the weights, but described as {list(shape)}")


def _stored(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise RuntimeError(f"{name} is not among the weights")
    return tensors[name]
