"""Attention to windows as gathered blocks: one batch of small softmax attentions, keys common to all joined to their scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.token_attentions import lowers
from ditq.export.lowering.token_attentions.blocks import BlockIndices, block_indices
from ditq.export.lowering.token_attentions.pooling import pooled
from ditq.export.lowering.token_attentions.tokens import END, Size, Tokens
from ditq.nn.structural.local_attention import windows_of
from ditq.numerics.head_windows import Heads, grouped, order_of
from ditq.numerics.window import Window


@lowers("local_attention")
def local_attention(tokens: Tokens) -> ir.Value:
    """As `numerics.local_attention.local_attention`."""
    query = tokens.scaled(tokens.query)
    (image_query, text_query), (image_key, text_key) = tokens.parted(query), tokens.parted(tokens.key)
    image_value, text_value = tokens.parted(tokens.value)
    common = [] if text_key is None or text_value is None else [(text_key, text_value)]
    if pool := tokens.settings["pool"]:
        small = [
            pooled(tokens, values, weights, pool)
            for values, weights in zip((image_key, image_value), tokens.tensors, strict=True)
        ]
        common.append((small[0], small[1]))
    given = (image_query, image_key, image_value)
    groups = grouped(windows_of(tokens.settings["window"], tokens.heads))
    parts = []
    for group in groups:
        query_of, key_of, value_of, *seen = (
            _of_heads(tokens, values, group) for values in (*given, *(values for pair in common for values in pair))
        )
        pairs = list(zip(seen[::2], seen[1::2], strict=True))
        if group.window is None:  # of all, in which squares are not seen beside
            pairs = [(key_of, value_of), *pairs[: int(tokens.has_text)]]
            parts.append(tokens.attended(query_of, *joined_pairs(tokens, pairs)))
        else:
            scores = window_scores(tokens, query_of, key_of, value_of, pairs, group.window)
            parts.append(scores.placed(scores.attended()))
    image = parts[0]
    if len(groups) > 1:
        order = tokens.writer.constant(order_of(groups), np.int64, name="order")
        image = tokens.writer.op("Concat", *parts, name="heads", axis=1)
        image = tokens.writer.op("Gather", image, order, name="heads_in_order", axis=1)
    text = None if text_query is None else tokens.attended(text_query, tokens.key, tokens.value)
    return tokens.joined(image, text)


def _of_heads(tokens: Tokens, values: ir.Value, group: Heads) -> ir.Value:
    """Of [B, h, .., d] those of a group."""
    if len(group.numbers) == tokens.heads:
        return values
    numbers = tokens.writer.constant(group.numbers, np.int64, name="numbers")
    return tokens.writer.op("Gather", values, numbers, name="heads", axis=1)


def joined_pairs(tokens: Tokens, pairs: list[tuple[ir.Value, ir.Value]]) -> tuple[ir.Value, ir.Value]:
    """Pairs of keys and values [B, h, G, d], one behind the other."""
    keys, values = (
        parts[0] if len(parts) == 1 else tokens.writer.op("Concat", *parts, name="common", axis=2)
        for parts in zip(*pairs, strict=True)
    )
    return keys, values


@dataclass(frozen=True, eq=False)
class BlockwiseKeys:
    """Keys and values [B, h, P, d] that all queries share, and what each block adds to its scores over them [.., T, 1, P]."""

    key: ir.Value
    value: ir.Value
    added: ir.Value
    number: Size


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Scores of image queries in the order of blocks, [B, h, T Q, K + G], over the K keys of their window and G that all share.

    `values` [B, h, T, K, d] and `common` [B, h, G, d] are what they weigh, `blocks` tells where each token is found.
    """

    tokens: Tokens
    scores: ir.Value
    queries: ir.Value
    values: ir.Value
    common: ir.Value | None
    blocks: BlockIndices
    size: Size

    def attended(self) -> ir.Value:
        """softmax times values, in the order of blocks: [B, h, T Q, d]."""
        return self.weighed(self.tokens.writer.op("Softmax", self.scores, name="weights", axis=-1))

    def weighed(self, weights: ir.Value) -> ir.Value:
        """Values summed with weights [B, h, T Q, K + G]."""
        tokens, writer, sizes = self.tokens, self.tokens.writer, self.tokens.sizes
        own = weights if self.common is None else tokens.cut(weights, 0, self.size, axis=3)
        own = writer.op("Reshape", own, sizes.shape(0, 0, -1, self.blocks.block, self.size), name="blocks")
        y = writer.op("MatMul", own, self.values, name="attended")
        y = writer.op("Reshape", y, sizes.shape(0, 0, -1, tokens.width), name="flat")
        if self.common is None:
            return y
        rest = tokens.cut(weights, self.size, END, axis=3)
        return writer.op("Add", y, writer.op("MatMul", rest, self.common, name="common"), name="both")

    def placed(self, y: ir.Value) -> ir.Value:
        """From the order of blocks to that of tokens: [B, h, FHW, d]."""
        return self.blocks.placed(y)


def window_scores(
    tokens: Tokens,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    common: list[tuple[ir.Value, ir.Value]],
    window: Window,
) -> WindowScores:
    """Of scaled image queries over image keys, and over pairs of keys and values [B, h, G, d] that all of them see."""
    made = block_indices(tokens, window)
    keys, values = (tokens.taken(found, made.keys) for found in (key, value))
    return joined_scores(tokens, made.of_queries(query), keys, values, common, made, made.size, made.hidden)


def joined_scores(
    tokens: Tokens,
    queries: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    common: list[tuple[ir.Value, ir.Value]],
    blocks: BlockIndices,
    size: Size,
    hidden: ir.Value | None,
    blockwise: BlockwiseKeys | None = None,
) -> WindowScores:
    """Of scaled queries of blocks [B, h, T, Q, d] over their own keys [B, h, T, K, d] and over common ones; `size` is K,
    and `hidden` is added to scores of own keys. `blockwise`: common ones too, to which blocks add what is theirs."""
    writer, sizes, block = tokens.writer, tokens.sizes, blocks.block
    scores = writer.op("MatMul", queries, tokens.turned(keys, 5), name="scores")
    if hidden is not None:
        scores = writer.op("Add", scores, hidden, name="seen")
    parts = [writer.op("Reshape", scores, sizes.shape(0, 0, -1, size), name="flat")]
    flat = writer.op("Reshape", queries, sizes.shape(0, 0, -1, tokens.width), name="flat")
    if common:
        parts.append(writer.op("MatMul", flat, tokens.turned(joined_pairs(tokens, common)[0]), name="common_scores"))
    if blockwise is not None:
        found = writer.op("MatMul", flat, tokens.turned(blockwise.key), name="common_scores")
        by_blocks = writer.op("Reshape", found, sizes.shape(0, 0, -1, block, blockwise.number), name="by_blocks")
        by_blocks = writer.op("Add", by_blocks, blockwise.added, name="added")
        parts.append(writer.op("Reshape", by_blocks, sizes.shape(0, 0, -1, blockwise.number), name="flat"))
    shared = [*common, *([] if blockwise is None else [(blockwise.key, blockwise.value)])]
    everywhere = joined_pairs(tokens, shared)[1] if shared else None
    scores = parts[0] if len(parts) == 1 else writer.op("Concat", *parts, name="all_scores", axis=-1)
    return WindowScores(tokens, scores, flat, values, everywhere, blocks, size)
