"""What holds for all quantized parts of a model for a while: that it is being exported, or who rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ditq.nn.attention_rounding import AttentionRounding
from ditq.nn.quant_linear import QuantLinear, Rounding
from ditq.nn.structural.ordered_tokens import OrderedTokens
from ditq.nn.structural.token_attention import TokenAttention, token_attentions


@contextmanager
def exporting(model: nn.Module) -> Iterator[nn.Module]:
    """Within it every QuantLinear, rounded attention and token attention of `model` is one opaque node, which an export
    target lowers in its own form.
    """
    try:
        with _set(model, "exporting", True, False):
            yield model
    finally:
        for part in token_attentions(model).values():
            part.grid = None  # one of tensors without values


@contextmanager
def rounded_by(model: nn.Module, rounding: Rounding) -> Iterator[nn.Module]:
    """Within it every QuantLinear of `model` takes its input's integers, and every rounded attention the numbers that it
    multiplies, from `rounding`, not from the nearest.
    """
    with _set(model, "rounding", rounding, None):
        yield model


@contextmanager
def _set(model: nn.Module, name: str, within: object, after: object) -> Iterator[None]:
    parts = [
        module
        for module in model.modules()
        if isinstance(module, QuantLinear | AttentionRounding | TokenAttention | OrderedTokens)
    ]
    try:
        for part in parts:
            setattr(part, name, within)
        yield
    finally:
        for part in parts:
            setattr(part, name, after)
