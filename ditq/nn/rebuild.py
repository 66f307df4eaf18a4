"""Describe what the passes put into a model, and put the same structure into a fresh one, for loading an engine's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ditq.nn import attention_rounding
from ditq.nn.attention_rounding import AttentionRounding
from ditq.nn.call_timestep import tell_at_each_call
from ditq.nn.input_transform import InputTransform
from ditq.nn.modulation_factor import ModulationFactor, attach
from ditq.nn.quant_linear import QuantLinear
from ditq.nn.structural import describe_parts, install_parts
from ditq.nn.transformed_linear import TransformedLinear
from ditq.numerics.attention_rounding import AttentionFormat


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
        RuntimeError: `state` does not fit (load_state_dict's own message).
    """
    tensors = dict(state)
    install_parts(model, described.get("structural", []))  # absent in engines from before there were such
    for name, spec in described["transformed"].items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        transform = InputTransform.from_spec(spec, tensors, f"{name}.transform.")
        model.set_submodule(name, TransformedLinear(linear, transform))
    for name, spec in described["quantized"].items():
        model.set_submodule(name, QuantLinear.from_spec(spec, tensors))
    for name, spec in described["factors"].items():
        attach(model.get_submodule(name), **spec)
    for name, spec in described.get("attentions", {}).items():  # absent in engines from before there were such
        attention_rounding.attach(model.get_submodule(name), name, AttentionFormat(**spec))
    for name in described["biased"]:
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros(linear.out_features), requires_grad=False)
    if any(spec["activation"]["granularity"] == "timestep" for spec in described["quantized"].values()):
        tell_at_each_call(model)
    model.load_state_dict(tensors, assign=True)
