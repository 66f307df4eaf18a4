"""The indices of windows over a picture (numerics/window.py): constants, or made of the picture's size while the graph runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.token_attentions.tokens import Size, Sizes, Tokens
from ditq.numerics.window import Window, blocks, patches

LOWEST = np.float32(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class BlockIndices:
    """As `numerics.window.Blocks`: queries [T, t^2], keys [T, K], places [HW]; `hidden`: float32 [T, t^2, K], 0 where a key
    is seen, else the lowest number; None where all are. `size`: K.
    """

    queries: ir.Value
    keys: ir.Value
    places: ir.Value
    hidden: ir.Value | None
    size: Size


def block_indices(tokens: Tokens, window: Window) -> BlockIndices:
    """Of the attention's picture, once for all attentions with this window."""
    sizes, writer, height, width = tokens.sizes, tokens.writer, tokens.height, tokens.width_of_picture
    size = sizes.times(sizes.least(height, window.extent), sizes.least(width, window.extent))
    circle = window.shape == "circle"

    def value(name: str) -> ir.Value:
        return tokens.shared[(window, name, *tokens.picture)]

    if (window, "queries", *tokens.picture) not in tokens.shared:
        if isinstance(height, int) and isinstance(width, int):
            known = blocks(window, height, width)
            made = {name: writer.constant(getattr(known, name), name=name) for name in ("queries", "keys", "places")}
            seen = None if known.seen is None else writer.constant(known.seen, name="seen")
        else:
            made = _Varying(sizes, height, width, window).indices()
            seen = made.pop("seen", None)
        if seen is not None:
            zero, lowest = (writer.constant(number, np.float32, name="number") for number in (0, LOWEST))
            made["hidden"] = writer.op("Where", seen, zero, lowest, name="hidden")
        tokens.shared.update({(window, name, *tokens.picture): found for name, found in made.items()})
    hidden = value("hidden") if circle else None
    return BlockIndices(value("queries"), value("keys"), value("places"), hidden, size)


def patch_indices(tokens: Tokens, patch: int) -> ir.Value:
    """As `numerics.window.patches`: int64 [P, patch^2]."""
    sizes, height, width = tokens.sizes, tokens.height, tokens.width_of_picture
    if isinstance(height, int) and isinstance(width, int):
        return tokens.writer.constant(patches(patch, height, width), name="patches")

    def make() -> ir.Value:
        varying = _Varying(sizes, height, width, Window("tiles", 1, patch))
        return varying.crossed(varying.query_rows, varying.query_columns, patch * patch)

    return tokens.once(("patches", patch), make)


class _Varying:
    """The same formulas as in numerics/window.py, as nodes."""

    def __init__(self, sizes: Sizes, height: Size, width: Size, window: Window) -> None:
        self.sizes, self.writer, self.window = sizes, sizes.writer, window
        self.height, self.width = height, width
        self.query_rows, self.key_rows, _, self.rows = self._side(height)
        self.query_columns, self.key_columns, self.blocks_across, self.columns = self._side(width)

    def _constant(self, number: int) -> ir.Value:
        return self.writer.constant([number], np.int64, name="size")

    def _side(self, length: Size) -> tuple[ir.Value, ir.Value, Size, Size]:
        """queries [C, t], keys [C, e], C, e along one side of the picture."""
        writer, sizes, window = self.writer, self.sizes, self.window
        count, extent = sizes.divided_up(length, window.tile), sizes.least(length, window.extent)
        steps = writer.op("Mul", sizes.up_to(count), self._constant(window.tile), name="steps")
        starts = writer.op("Sub", steps, self._constant(window.before), name="starts")
        last = sizes.most(sizes.plus(length, -window.extent), 0)
        starts = writer.op("Max", starts, self._constant(0), name="inside")
        starts = writer.op("Min", starts, sizes.value(last), name="inside")
        keys = writer.op("Add", self._spread(starts, [1]), self._spread(sizes.up_to(extent), [0]), name="keys")
        tokens = sizes.up_to(sizes.times(count, window.tile))
        tokens = writer.op("Min", tokens, sizes.value(sizes.plus(length, -1)), name="inside")
        return writer.op("Reshape", tokens, sizes.shape(-1, window.tile), name="queries"), keys, count, extent

    def _spread(self, numbers: ir.Value, axes: list[int]) -> ir.Value:
        return self.writer.op("Unsqueeze", numbers, self.writer.constant(axes, np.int64, name="axes"), name="spread")

    def crossed(self, rows: ir.Value, columns: ir.Value, size: Size) -> ir.Value:
        """Tokens at every row of a block [R, r] and every column of one [C, c]: int64 [R C, r c]; `size` is r c."""
        writer = self.writer
        across = writer.op("Mul", self._spread(rows, [1, 3]), self.sizes.value(self.width), name="rows")
        tokens = writer.op("Add", across, self._spread(columns, [0, 2]), name="tokens")
        return writer.op("Reshape", tokens, self.sizes.shape(-1, size), name="block")

    def indices(self) -> dict[str, ir.Value]:
        """Of the window's blocks."""
        tile = self.window.tile
        queries = self.crossed(self.query_rows, self.query_columns, tile * tile)
        keys = self.crossed(self.key_rows, self.key_columns, self.sizes.times(self.rows, self.columns))
        found = {"queries": queries, "keys": keys, "places": self._places()}
        if self.window.shape == "circle":
            found["seen"] = self._seen(queries, keys)
        return found

    def _places(self) -> ir.Value:
        writer, tile = self.writer, self._constant(self.window.tile)
        rows, columns = self._divided(self.sizes.up_to(self.sizes.times(self.height, self.width)), self.width)
        (down, row), (across, column) = (self._divided(numbers, self.window.tile) for numbers in (rows, columns))
        place = writer.op("Mul", down, self.sizes.value(self.blocks_across), name="blocks")
        for number in (across, row, column):
            if number is not across:
                place = writer.op("Mul", place, tile, name="place")
            place = writer.op("Add", place, number, name="place")
        return place

    def _seen(self, queries: ir.Value, keys: ir.Value) -> ir.Value:
        """Which keys [T, K] lie in the circle around which queries [T, t^2]: bool [T, t^2, K]."""
        writer, squares = self.writer, []
        for query, key in zip(self._divided(queries, self.width), self._divided(keys, self.width), strict=True):
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
