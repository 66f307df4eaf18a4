"""What holds for all quantized parts of a model for a while: that it is being exported, or who rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ditq.nn.attention_rounding import AttentionRounding
from ditq.nn.quant_linear import QuantLinear, Rounding


def _parts(model: nn.Module) -> list[QuantLinear | AttentionRounding]:
    return [module for module in model.modules() if isinstance(module, QuantLinear | AttentionRounding)]


@contextmanager
def exporting(model: nn.Module) -> Iterator[nn.Module]:
    """Within it every QuantLinear and rounded attention of `model` is one opaque node, which an export target lowers in its
    own form.
    """
    parts = _parts(model)
    try:
        for part in parts:
            part.exporting = True
        yield model
    finally:
        for part in parts:
            part.exporting = False


@contextmanager
def rounded_by(model: nn.Module, rounding: Rounding) -> Iterator[nn.Module]:
    """Within it every QuantLinear of `model` takes its input's integers, and every rounded attention the numbers that it
    multiplies, from `rounding`, not from the nearest.
    """
    parts = _parts(model)
    try:
        for part in parts:
            part.rounding = rounding
        yield model
    finally:
        for part in parts:
            part.rounding = None
