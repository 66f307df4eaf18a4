"""Attention to chosen tiles as gathered blocks, like a window's, of which each head has its own; TopK where they are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ditq.errors import DitqError
from ditq.export.lowering.token_attentions import lowers
from ditq.export.lowering.token_attentions.blocks import LOWEST, block_indices
from ditq.export.lowering.token_attentions.local_attention import BlockwiseKeys, joined_scores
from ditq.export.lowering.token_attentions.pooling import logarithms
from ditq.export.lowering.token_attentions.tokens import Size, Tokens
from ditq.nn.structural.sparse_attention import other_picture
from ditq.numerics.sparse_attention import tiles_of
from ditq.numerics.window import Window

HIGHEST = -LOWEST


@lowers("sparse_attention")
def sparse_attention(tokens: Tokens) -> ir.Value:
    """As `numerics.sparse_attention.sparse_attention`."""
    _fix_picture(tokens)
    sizes, tile = tokens.sizes, tokens.settings["tile"]
    query = tokens.scaled(tokens.query)
    (image_query, text_query), (image_key, text_key) = tokens.parted(query), tokens.parted(tokens.key)
    image_value, text_value = tokens.parted(tokens.value)
    common = [] if text_key is None or text_value is None else [(text_key, text_value)]
    indices = block_indices(tokens, Window("tiles", 1, tile))
    queries, keys, values = (indices.of_queries(image) for image in (image_query, image_key, image_value))
    rows, columns = (sizes.divided_up(length, tile) for length in (tokens.height, tokens.width_of_picture))
    count = sizes.times(tokens.frames, sizes.times(rows, columns))
    seen = _Given(tokens, tokens.tensors[0]) if tokens.tensors else _chosen(tokens, queries, keys, count)
    size = sizes.times(seen.number, tile**2)
    hidden = _hidden(tokens, indices.queries, indices.places)
    if hidden is not None:
        hidden = seen.hidden(hidden, size)
    means = _means(tokens, keys, values, seen, count) if tokens.settings.get("means") else None
    keys, values = seen.gathered(keys, size), seen.gathered(values, size)
    scores = joined_scores(tokens, queries, keys, values, common, indices, size, hidden, means)
    image = scores.placed(scores.attended())
    text = None if text_query is None else tokens.attended(text_query, tokens.key, tokens.value)
    return tokens.joined(image, text)


def _fix_picture(tokens: Tokens) -> None:
    """Where tiles were chosen before, the picture has the size that they were chosen for, whatever else could vary.

    Raises:
        DitqError: the graph is for pictures of another size.
    """
    if tokens.settings["picture"] is None:
        return
    height, width = tokens.settings["picture"]
    given = (tokens.height, tokens.width_of_picture)
    if isinstance(given[0], int) and isinstance(given[1], int) and given != (height, width):
        raise DitqError(f"{tokens.site}: {other_picture((height, width), (given[0], given[1]))}")
    tokens.height, tokens.width_of_picture = height, width


def _hidden(tokens: Tokens, members: ir.Value, places: ir.Value) -> ir.Value | None:
    """float32 [T, t^2], the lowest number where a token stands again beyond an edge, else 0; None where none does."""
    writer, sizes, tile = tokens.writer, tokens.sizes, tokens.settings["tile"]
    known = tokens.known_sides
    lowest, zero = (writer.constant(number, np.float32, name="number") for number in (LOWEST, 0))
    if known is not None:
        real = tiles_of(tile, *known).real
        return None if real is None else writer.constant(np.where(real, np.float32(0), LOWEST), name="hidden")

    def make() -> ir.Value:
        flat = writer.op("Reshape", members, sizes.shape(-1), name="flat")
        slots = writer.op("Shape", flat, name="count")
        zero_slot, one = (writer.constant(number, np.int64, name="number") for number in (0, 1))
        axis = writer.constant([0], np.int64, name="axis")
        slots = writer.op("Range", zero_slot, writer.op("Squeeze", slots, axis, name="count"), one, name="numbers")
        real = writer.op("Equal", writer.op("Gather", places, flat, name="first", axis=0), slots, name="real")
        hidden = writer.op("Where", real, zero, lowest, name="hidden")
        return writer.op("Reshape", hidden, sizes.shape(-1, tile**2), name="hidden")

    return tokens.once(("hidden", tile), make)


def _chosen(tokens: Tokens, queries: ir.Value, keys: ir.Value, count: Size) -> _Found:
    """The `keep` tiles of the highest scores, as `numerics.sparse_attention.tile_scores`."""
    writer, sizes = tokens.writer, tokens.sizes
    axis = writer.constant([3], np.int64, name="axis")
    means = [writer.op("ReduceMean", tiled, axis, name="means", keepdims=0) for tiled in (queries, keys)]
    scores = writer.op("MatMul", means[0], tokens.turned(means[1]), name="tile_scores")
    highest = writer.constant(HIGHEST, np.float32, name="number")
    scores = writer.op("Where", _own(tokens, count), highest, scores, name="tile_scores")
    number = sizes.least(tokens.settings["keep"], count)
    _, found = writer.ops("TopK", 2, scores, sizes.value(number), name="chosen", axis=-1, sorted=0)
    return _Found(tokens, found, number)


def _means(tokens: Tokens, keys: ir.Value, values: ir.Value, seen: _Found, count: Size) -> BlockwiseKeys:
    """The mean key and value of each tile [B, h, T, d], weighed by its tokens, for the tiles that do not see it."""
    writer = tokens.writer
    axis = writer.constant([3], np.int64, name="axis")
    key, value = (writer.op("ReduceMean", tiled, axis, name="means", keepdims=0) for tiled in (keys, values))
    counts = writer.op("Expand", logarithms(tokens, tokens.settings["tile"]), seen.shape(count), name="counts")
    lowest = writer.constant(LOWEST, name="number")
    nothing = writer.op("Expand", lowest, writer.op("Shape", seen.seen, name="shape"), name="lowest")
    unseen = writer.op("ScatterElements", counts, seen.seen, nothing, name="unseen", axis=-1)
    added = writer.op("Unsqueeze", unseen, writer.constant([-2], np.int64, name="axes"), name="unseen")
    return BlockwiseKeys(key, value, added, count)


def _own(tokens: Tokens, count: Size) -> ir.Value:
    """bool [T, T]: a tile and itself."""
    writer, sizes = tokens.writer, tokens.sizes
    if isinstance(count, int):
        return writer.constant(np.eye(count, dtype=bool), name="own")

    def make() -> ir.Value:
        numbers = sizes.up_to(count)
        down = writer.op("Unsqueeze", numbers, writer.constant([1], np.int64, name="axes"), name="down")
        return writer.op("Equal", down, numbers, name="own")

    return tokens.once(("own", tokens.settings["tile"]), make)


@dataclass(frozen=True, eq=False)
class _Found:
    """Tiles [B, h, T, k] that were chosen at this call."""

    tokens: Tokens
    seen: ir.Value
    number: Size

    def gathered(self, tiled: ir.Value, size: Size) -> ir.Value:
        """[B, h, T, t^2, d] -> [B, h, T, k t^2, d]."""
        writer, sizes = self.tokens.writer, self.tokens.sizes
        whole = self.tokens.settings["tile"] ** 2 * self.tokens.width
        rows = writer.op("Reshape", tiled, sizes.shape(0, 0, -1, whole), name="rows")
        index = writer.op("Unsqueeze", self.seen, writer.constant([-1], np.int64, name="axes"), name="index")
        found = writer.op("GatherND", rows, index, name="seen", batch_dims=2)
        return writer.op("Reshape", found, sizes.shape(0, 0, 0, size, self.tokens.width), name="seen")

    def shape(self, count: Size) -> ir.Value:
        """int64 [..]: of numbers for each tile and each that it may see, [B, h, T, T]."""
        tokens = self.tokens
        batch = tokens.cut(tokens.writer.op("Shape", tokens.query, name="shape"), 0, 1, axis=0)
        return tokens.sizes.shape(batch, tokens.heads, count, count)

    def hidden(self, hidden: ir.Value, size: Size) -> ir.Value:
        """[T, t^2] -> [B, h, T, 1, k t^2]."""
        found = self.tokens.writer.op("Gather", hidden, self.seen, name="hidden", axis=0)
        return self.tokens.writer.op("Reshape", found, self.tokens.sizes.shape(0, 0, 0, 1, size), name="hidden")


class _Given(_Found):
    """Tiles [h, T, k] that were chosen before, for a picture of known size."""

    def __init__(self, tokens: Tokens, seen: ir.Value) -> None:
        super().__init__(tokens, seen, tokens.settings["keep"])

    def gathered(self, tiled: ir.Value, size: Size) -> ir.Value:
        tokens, writer, sizes = self.tokens, self.tokens.writer, self.tokens.sizes
        height, width = tokens.settings["picture"]
        tiles = len(tiles_of(tokens.settings["tile"], height, width).tokens)
        whole = tokens.settings["tile"] ** 2 * tokens.width
        first = writer.constant(np.arange(tokens.heads, dtype=np.int32)[:, None, None] * tiles, name="heads")
        rows = writer.op("Reshape", tiled, sizes.shape(0, tokens.heads * tiles, whole), name="rows")
        index = writer.op("Reshape", writer.op("Add", self.seen, first, name="index"), sizes.shape(-1), name="index")
        found = writer.op("Gather", rows, index, name="seen", axis=1)
        return writer.op("Reshape", found, sizes.shape(0, tokens.heads, tiles, size, tokens.width), name="seen")

    def shape(self, count: Size) -> ir.Value:
        return self.tokens.sizes.shape(self.tokens.heads, count, count)

    def hidden(self, hidden: ir.Value, size: Size) -> ir.Value:
        found = self.tokens.writer.op("Gather", hidden, self.seen, name="hidden", axis=0)
        shape = self.tokens.sizes.shape(self.tokens.heads, -1, 1, size)
        return self.tokens.writer.op("Reshape", found, shape, name="hidden")
