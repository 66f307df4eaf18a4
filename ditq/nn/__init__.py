"""What a pass puts in place of a layer."""

from ditq.nn.input_transform import InputTransform
from ditq.nn.quant_linear import ActivationFormat, QuantLinear, exporting

__all__ = ["ActivationFormat", "InputTransform", "QuantLinear", "exporting"]
