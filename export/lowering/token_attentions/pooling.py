"""Squares of image tokens as one token each (numerics/local_attention.py, `Pooling`), and how many tokens each of them has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.token_attentions.blocks import patch_indices
from ditq.export.lowering.token_attentions.tokens import Tokens
from ditq.numerics.compressed_keys import log_counts


def pooled(tokens: Tokens, values: ir.Value, weights: ir.Value, patch: int) -> ir.Value:
    """Image tokens [B, h, FHW, d] summed by patches with weights [h, patch^2] over their sum: [B, h, P, d]."""
    writer = tokens.writer
    axis = writer.constant([-1], np.int64, name="axis")
    total = writer.op("ReduceSum", weights, axis, name="total", keepdims=1)
    shares = writer.op("Div", weights, total, name="shares")
    shares = writer.op("Reshape", shares, tokens.sizes.shape(tokens.heads, 1, patch**2, 1), name="shares")
    found = writer.op("Gather", values, patch_indices(tokens, patch), name="patches", axis=2)
    inside = writer.constant([3], np.int64, name="axis")
    return writer.op("ReduceSum", writer.op("Mul", found, shares, name="shared"), inside, name="pooled", keepdims=0)


def logarithms(tokens: Tokens, patch: int) -> ir.Value:
    """As `numerics.compressed_keys.log_counts`: float32 [P]."""
    known = tokens.known_sides
    if known is not None:
        return tokens.writer.constant(log_counts(patch, *known), name="log_counts")
    return tokens.once(("log_counts", patch), lambda: _varying_logarithms(tokens, patch))


def _varying_logarithms(tokens: Tokens, patch: int) -> ir.Value:
    """log of min(patch, height - patch r) min(patch, width - patch c), for each frame again."""
    writer, sizes = tokens.writer, tokens.sizes
    step = writer.constant([patch], np.int64, name="size")
    sides = []
    for length, axis in ((tokens.height, 1), (tokens.width_of_picture, 0)):
        starts = writer.op("Mul", sizes.up_to(sizes.divided_up(length, patch)), step, name="starts")
        left = writer.op("Sub", sizes.value(length), starts, name="left")
        count = writer.op("Min", left, step, name="count")
        sides.append(writer.op("Unsqueeze", count, writer.constant([axis], np.int64, name="axes"), name="side"))
    counts = writer.op("Reshape", writer.op("Mul", *sides, name="counts"), sizes.shape(-1), name="counts")
    if not (isinstance(tokens.frames, int) and tokens.frames == 1):  # a value of the graph bears no comparison
        counts = writer.op("Tile", counts, sizes.value(tokens.frames), name="counts")
    return writer.op("Log", writer.op("Cast", counts, name="counts", to=ir.DataType.FLOAT), name="log_counts")
