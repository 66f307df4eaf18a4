"""Compressed keys as one plain attention with fewer keys, which each target runs as it runs others.

What is added to the scores of squares is one channel more: 1 in the queries, the number in the keys. A mask would be a matrix
of tokens times squares, and attentions without one run in one kernel. Heads are widened by 8 channels, of which the others are
0: products in half precision are made of so many.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.token_attentions import lowers
from ditq.export.lowering.token_attentions.pooling import logarithms, pooled
from ditq.export.lowering.token_attentions.tokens import Tokens
from ditq.numerics.compressed_keys import is_even
from ditq.numerics.token_layout import Grid

MORE = 8


@lowers("compress_keys")
def compressed_keys(tokens: Tokens) -> ir.Value:
    """As `numerics.compressed_keys.compressed_attention`."""
    writer, factor = tokens.writer, tokens.settings["factor"]
    (image_key, text_key), (image_value, text_value) = tokens.parted(tokens.key), tokens.parted(tokens.value)
    query = tokens.scaled(tokens.query)
    key, value = (
        pooled(tokens, image, weights, factor)
        for image, weights in zip((image_key, image_value), tokens.tensors[:2], strict=True)
    )
    added = _added(tokens)
    if added is not None:
        key = writer.op("Add", _widened(tokens, key, 0), added, name="weighed")
        query, value = _widened(tokens, query, 1), _widened(tokens, value, 0)
    if text_key is not None and text_value is not None:
        if added is not None:
            text_key, text_value = _widened(tokens, text_key, 0), _widened(tokens, text_value, 0)
        key = writer.op("Concat", text_key, key, name="seen", axis=2)
        value = writer.op("Concat", text_value, value, name="seen", axis=2)
    width = tokens.width + MORE * (added is not None)
    for given in (query, key, value):
        given.shape, given.type = ir.Shape([None, tokens.heads, None, width]), ir.TensorType(ir.DataType.FLOAT)
    y = writer.op("Attention", query, key, value, name="attention", scale=1.0)
    return y if added is None else tokens.cut(y, 0, tokens.width, axis=3)


def _widened(tokens: Tokens, values: ir.Value, number: float) -> ir.Value:
    """With MORE channels of this number behind those that there are."""
    writer = tokens.writer
    pads = writer.constant([0] * 7 + [MORE], np.int64, name="pads")
    return writer.op("Pad", values, pads, writer.constant(np.float32(number), name="number"), name="widened")


def _added(tokens: Tokens) -> ir.Value | None:
    """What is added to keys of squares, [h or 1, P, d + MORE], 0 in their own channels; None where that changes nothing."""
    writer, sizes, settings = tokens.writer, tokens.sizes, tokens.settings
    count, factor, gains = settings["count"], settings["factor"], tokens.tensors[2:]
    known = tokens.known_sides
    if not gains and (not count or (known is not None and is_even(factor, Grid(0, *known[1:])))):
        return None
    logs = logarithms(tokens, factor)
    if not count:
        logs = writer.op("Mul", logs, writer.constant(np.float32(0), name="number"), name="not_counted")
    found = writer.op("Reshape", logs, sizes.shape(1, -1, 1), name="added")
    if gains:
        gain = writer.op("Reshape", gains[0], sizes.shape(tokens.heads, 1, 1), name="gain")
        found = writer.op("Add", found, gain, name="gained")
    return writer.op(
        "Pad", found, writer.constant([0, 0, tokens.width, 0, 0, MORE - 1], np.int64, name="pads"), name="added"
    )
