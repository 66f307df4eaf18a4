"""What a pass puts in place of a layer."""

from ditq.nn.attention_rounding import AttentionRounding
from ditq.nn.input_transform import InputTransform
from ditq.nn.modes import exporting, rounded_by
from ditq.nn.modulation_factor import ModulationFactor
from ditq.nn.quant_linear import ActivationFormat, QuantLinear
from ditq.nn.rebuild import describe, rebuild
from ditq.nn.transformed_linear import TransformedLinear

__all__ = [
    "ActivationFormat",
    "AttentionRounding",
    "InputTransform",
    "ModulationFactor",
    "QuantLinear",
    "TransformedLinear",
    "describe",
    "exporting",
    "rebuild",
    "rounded_by",
]
