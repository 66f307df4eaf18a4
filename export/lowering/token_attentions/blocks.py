"""The indices of windows over a picture or video (numerics/window.py): constants, or made of its size while the graph runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.token_attentions.tokens import Size, Sizes, Tokens
from ditq.numerics.window import Side, Window, blocks, patches

LOWEST = np.float32(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class BlockIndices:
    """As `numerics.window.Blocks`: queries [T, Q], keys [T, K], places [FHW]; `hidden`: float32 [T, Q, K], 0 where a key
    is seen, else the lowest number; None where all are. `size`: K, `block`: Q. `in_place`: tokens lie as queries do.
    """

    tokens: Tokens
    queries: ir.Value
    keys: ir.Value
    places: ir.Value
    hidden: ir.Value | None
    size: Size
    block: int
    in_place: bool

    def of_queries(self, values: ir.Value) -> ir.Value:
        """[B, h, FHW, d] -> [B, h, T, Q, d]."""
        if not self.in_place:
            return self.tokens.taken(values, self.queries)
        shape = self.tokens.sizes.shape(0, 0, -1, self.block, self.tokens.width)
        return self.tokens.writer.op("Reshape", values, shape, name="blocks")

    def placed(self, values: ir.Value) -> ir.Value:
        """[B, h, T Q, d] -> [B, h, FHW, d]."""
        return values if self.in_place else self.tokens.taken(values, self.places)


def block_indices(tokens: Tokens, window: Window) -> BlockIndices:
    """Of the attention's picture, once for all attentions with this window."""
    sizes, writer, known = tokens.sizes, tokens.writer, tokens.known_sides
    extents = (sizes.least(length, side.extent) for side, length in zip(window.sides, tokens.sides, strict=True))
    size = reduce(sizes.times, extents)
    circle, in_place = (
        window.shape == "circle",
        known is not None and blocks(window, *known, order=tokens.order).in_place,
    )

    def value(name: str) -> ir.Value:
        return tokens.shared[(window, name, *tokens.picture)]

    if (window, "queries", *tokens.picture) not in tokens.shared:
        if known is not None:
            found = blocks(window, *known, order=tokens.order)
            made = {name: writer.constant(getattr(found, name), name=name) for name in ("queries", "keys", "places")}
            seen = None if found.seen is None else writer.constant(found.seen, name="seen")
        else:
            made = _Varying(sizes, tokens.sides, window).indices()
            seen = made.pop("seen", None)
            if tokens.order is not None:
                made |= {name: tokens.placed(made[name]) for name in ("queries", "keys")}
                made["places"] = tokens.taken(made["places"], tokens.listed(), 0)
        if seen is not None:
            zero, lowest = (writer.constant(number, np.float32, name="number") for number in (0, LOWEST))
            made["hidden"] = writer.op("Where", seen, zero, lowest, name="hidden")
        tokens.shared.update({(window, name, *tokens.picture): found for name, found in made.items()})
    hidden = value("hidden") if circle else None
    queries, keys, places = (value(name) for name in ("queries", "keys", "places"))
    return BlockIndices(tokens, queries, keys, places, hidden, size, window.block, in_place)


def patch_indices(tokens: Tokens, patch: int) -> ir.Value:
    """As `numerics.window.patches`: int64 [P, patch^2]."""
    known = tokens.known_sides
    if known is not None:
        return tokens.writer.constant(patches(patch, *known, order=tokens.order), name="patches")
    squares = Window("tiles", 1, patch)
    return tokens.once(
        ("patches", patch), lambda: tokens.placed(_Varying(tokens.sizes, tokens.sides, squares).queries())
    )


@dataclass(frozen=True, eq=False)
class _Along:
    """One side of the picture: its length, its number of blocks C, and the places of their queries [C, t] and keys [C, e]."""

    side: Side
    length: Size
    count: Size
    queries: ir.Value
    keys: ir.Value


class _Varying:
    """The same formulas as in numerics/window.py, as nodes. Of a picture there are two sides, for its frame adds nothing."""

    def __init__(self, sizes: Sizes, lengths: Sequence[Size], window: Window) -> None:
        self.sizes, self.writer, self.window = sizes, sizes.writer, window
        sides = list(zip(window.sides, lengths, strict=True))
        self.along = [self._side(*side) for side in (sides[1:] if lengths[0] == 1 else sides)]

    def _constant(self, number: int) -> ir.Value:
        return self.writer.constant([number], np.int64, name="size")

    def _side(self, side: Side, length: Size) -> _Along:
        writer, sizes = self.writer, self.sizes
        count, extent = sizes.divided_up(length, side.tile), sizes.least(length, side.extent)
        steps = writer.op("Mul", sizes.up_to(count), self._constant(side.tile), name="steps")
        starts = writer.op("Sub", steps, self._constant(side.before), name="starts")
        last = sizes.most(sizes.plus(length, -side.extent), 0)
        starts = writer.op("Max", starts, self._constant(0), name="inside")
        starts = writer.op("Min", starts, sizes.value(last), name="inside")
        keys = writer.op("Add", self._spread(starts, [1]), self._spread(sizes.up_to(extent), [0]), name="keys")
        tokens = sizes.up_to(sizes.times(count, side.tile))
        tokens = writer.op("Min", tokens, sizes.value(sizes.plus(length, -1)), name="inside")
        queries = writer.op("Reshape", tokens, sizes.shape(-1, side.tile), name="queries")
        return _Along(side, length, count, queries, keys)

    def _spread(self, numbers: ir.Value, axes: list[int]) -> ir.Value:
        return self.writer.op("Unsqueeze", numbers, self.writer.constant(axes, np.int64, name="axes"), name="spread")

    def _crossed(self, places: Sequence[ir.Value], size: Size) -> ir.Value:
        """Tokens at every place that each block has along each side, [C, c] of them: int64 [T, size]."""
        count, tokens = len(places), None
        for number, (along, found) in enumerate(zip(self.along, places, strict=True)):
            here = self._spread(found, [axis for axis in range(2 * count) if axis % count != number])
            if tokens is None:
                tokens = here
                continue
            tokens = self.writer.op("Mul", tokens, self.sizes.value(along.length), name="rows")
            tokens = self.writer.op("Add", tokens, here, name="tokens")
        assert tokens is not None
        return self.writer.op("Reshape", tokens, self.sizes.shape(-1, size), name="block")

    def queries(self) -> ir.Value:
        """[T, Q]."""
        return self._crossed([along.queries for along in self.along], self.window.block)

    def indices(self) -> dict[str, ir.Value]:
        """Of the window's blocks."""
        extents = (self.sizes.least(along.length, along.side.extent) for along in self.along)
        keys = self._crossed([along.keys for along in self.along], reduce(self.sizes.times, extents))
        queries = self.queries()
        found = {"queries": queries, "keys": keys, "places": self._places()}
        if self.window.shape == "circle":
            found["seen"] = self._seen(queries, keys)
        return found

    def _coordinates(self, tokens: ir.Value) -> list[ir.Value]:
        """Of tokens, along each side."""
        found = []
        for along in reversed(self.along[1:]):
            tokens, here = self._divided(tokens, along.length)
            found.append(here)
        return [tokens, *reversed(found)]

    def _places(self) -> ir.Value:
        writer = self.writer
        image = reduce(self.sizes.times, (along.length for along in self.along))
        coordinates = self._coordinates(self.sizes.up_to(image))
        parted = [self._divided(numbers, a.side.tile) for numbers, a in zip(coordinates, self.along, strict=True)]
        place = parted[0][0]
        further = [(along.count, block) for along, (block, _) in zip(self.along[1:], parted[1:], strict=True)]
        inside = [(along.side.tile, rest) for along, (_, rest) in zip(self.along, parted, strict=True)]
        for count, number in (*further, *inside):
            place = writer.op("Mul", place, self.sizes.value(count), name="place")
            place = writer.op("Add", place, number, name="place")
        return place

    def _seen(self, queries: ir.Value, keys: ir.Value) -> ir.Value:
        """Which keys [T, K] lie in the circle around which queries [T, Q]: bool [T, Q, K]."""
        writer, squares = self.writer, []
        for query, key in list(zip(self._coordinates(queries), self._coordinates(keys), strict=True))[-2:]:
            far = writer.op("Sub", self._spread(query, [2]), self._spread(key, [1]), name="far")
            squares.append(writer.op("Mul", far, far, name="square"))
        distance = writer.op("Add", *squares, name="distance")
        return writer.op("Less", distance, self._constant(self.window.size**2), name="seen")

    def _divided(self, numbers: ir.Value, by: Size) -> tuple[ir.Value, ir.Value]:
        """Quotient and remainder of each."""
        writer, divisor = self.writer, self.sizes.value(by)
        quotient = writer.op("Div", numbers, divisor, name="quotient")
        whole = writer.op("Mul", quotient, divisor, name="whole")
        return quotient, writer.op("Sub", numbers, whole, name="remainder")
