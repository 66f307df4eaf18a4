"""One token attention of the graph: its inputs, which of its tokens are text and which the picture, and sizes that may vary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.writer import Writer
from ditq.numerics.local_attention import temperature
from ditq.numerics.token_layout import TokenLayout
from ditq.numerics.token_order import TokenOrder

Size = int | ir.Value  # known now, or int64 [1] of the running graph
ROWS, COLUMNS = "picture/height", "picture/width"  # what the picture's size is called in a graph that is told it
END = np.iinfo(np.int64).max


class Sizes:
    """Whole numbers: computed now where they are known, by nodes of the graph where they are not."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def value(self, size: Size) -> ir.Value:
        """int64 [1]."""
        return self.writer.constant([size], np.int64, name="size") if isinstance(size, int) else size

    def shape(self, *sizes: Size) -> ir.Value:
        """int64 [n], for a Reshape: 0 keeps a dimension, -1 is what is left."""
        if all(isinstance(size, int) for size in sizes):
            return self.writer.constant(list(sizes), np.int64, name="shape")
        return self.writer.op("Concat", *(self.value(size) for size in sizes), name="shape", axis=0)

    def times(self, a: Size, b: Size) -> Size:
        if 1 in (a, b):
            return b if a == 1 else a
        return self._made("Mul", a, b, lambda x, y: x * y)

    def plus(self, a: Size, b: Size) -> Size:
        return self._made("Add", a, b, lambda x, y: x + y)

    def least(self, a: Size, b: Size) -> Size:
        return self._made("Min", a, b, min)

    def most(self, a: Size, b: Size) -> Size:
        return self._made("Max", a, b, max)

    def divided_up(self, a: Size, b: int) -> Size:
        """ceil(a / b)."""
        return self._made("Div", self.plus(a, b - 1), b, lambda x, y: x // y)

    def up_to(self, count: Size) -> ir.Value:
        """0, 1, .. count - 1: int64 [count]."""
        if isinstance(count, int):
            return self.writer.constant(np.arange(count), np.int64, name="numbers")
        zero, one = (self.writer.constant(number, np.int64, name="number") for number in (0, 1))
        axis = self.writer.constant([0], np.int64, name="axis")
        return self.writer.op("Range", zero, self.writer.op("Squeeze", count, axis, name="count"), one, name="numbers")

    def _made(self, kind: str, a: Size, b: Size, now: Callable[[int, int], int]) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return now(a, b)
        return self.writer.op(kind, self.value(a), self.value(b), name=kind.lower())


class Tokens:
    """What a lowering reads of a node and writes with; `shared` holds what attentions of one picture have in common."""

    def __init__(self, writer: Writer, node: ir.Node, shared: dict[tuple[object, ...], ir.Value]) -> None:
        self.writer, self.sizes, self.shared = writer, Sizes(writer), shared
        self.site = node.attributes["site"].as_string()
        self.settings = json.loads(node.attributes["settings"].as_string())
        self.heads, self.width = self.settings["heads"], self.settings["width"]
        self.given_scale = node.attributes["scale"].as_float()
        writer.move(node, f"{self.site}/{node.attributes['kind'].as_string()}")
        query, key, value, *sides = (value for value in node.inputs[:7] if value is not None)
        self.query, self.key, self.value = query, key, value
        text, height, width, self.frames = map(_size, sides)
        self.text: Size = text if self.settings["text"] else 0
        self.height, self.width_of_picture = self._told(ROWS, height), self._told(COLUMNS, width)
        self.order = _order(self.settings)
        if self.order is not None and self.order.picture is not None:
            self.height, self.width_of_picture = self.order.picture
        self.moved = node.inputs[7:9]
        self.tensors = [value for value in node.inputs[9:] if value is not None]
        self.plain: set[ir.Value] = set()  # products of softmax attention, which bear half precision

    def _told(self, name: str, size: Size) -> Size:
        """The size under a name by which whoever knows it better can find it."""
        if isinstance(size, int):
            return size
        if (name, size.name) not in self.shared:
            scope = self.writer.scope
            self.writer.scope, _, leaf = name.partition("/")
            self.shared[name, size.name] = self.writer.op("Identity", size, name=leaf)
            self.writer.scope = scope
        return self.shared[name, size.name]

    @property
    def image(self) -> Size:
        """Number of image tokens."""
        return reduce(self.sizes.times, self.sides)

    @property
    def sides(self) -> tuple[Size, Size, Size]:
        """Frames, rows and columns; of a picture there is one frame."""
        return self.frames, self.height, self.width_of_picture

    @property
    def known_sides(self) -> tuple[int, int, int] | None:
        """The same where all of them are known now."""
        frames, height, width = self.sides
        if isinstance(frames, int) and isinstance(height, int) and isinstance(width, int):
            return frames, height, width
        return None

    def placed(self, indices: ir.Value) -> ir.Value:
        """Indices of tokens that are counted row by row, as those of where they lie."""
        return indices if self.order is None else self.taken(self.places(), indices, 0)

    def listed(self) -> ir.Value:
        """Which token, counted row by row, lies at each place: int64 [FHW]. Of tokens in another order."""
        return self._moves(0)

    def places(self) -> ir.Value:
        """Where each token, counted row by row, lies: int64 [FHW]. Of tokens in another order."""
        return self._moves(1)

    def _moves(self, which: int) -> ir.Value:
        known, order, found = self.known_sides, self.order, self.moved[which]
        if known is None or order is None:
            assert found is not None
            return found
        numbers = (order.listed, order.places)[which](*known)
        return self.once(("moves", which), lambda: self.writer.constant(numbers, np.int64, name="moves"))

    def taken(self, values: ir.Value, indices: ir.Value, axis: int = 2) -> ir.Value:
        """values[.., indices, ..]."""
        return self.writer.op("Gather", values, indices, name="taken", axis=axis)

    @property
    def has_text(self) -> bool:
        return bool(self.settings["text"])

    def once(self, key: tuple[object, ...], make: Callable[[], ir.Value]) -> ir.Value:
        """What pictures of this size have in common, made by the first attention that asks for it."""
        place = (*key, *self.picture)
        if place not in self.shared:
            self.shared[place] = make()
        return self.shared[place]

    @property
    def picture(self) -> tuple[object, ...]:
        """What tells pictures of different sizes apart."""
        return tuple(map(_told, self.sides))

    def parted(self, tokens: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """[B, h, N, d] -> image tokens, text tokens or None."""
        if not self.has_text:
            return tokens, None
        if self.settings["text_first"]:
            return self.cut(tokens, self.text, END), self.cut(tokens, 0, self.text)
        return self.cut(tokens, 0, self.image), self.cut(tokens, self.image, END)

    def joined(self, image: ir.Value, text: ir.Value | None) -> ir.Value:
        """What `parted` took apart."""
        if text is None:
            return image
        order = (text, image) if self.settings["text_first"] else (image, text)
        return self.writer.op("Concat", *order, name="joined", axis=2)

    def cut(self, values: ir.Value, start: Size, stop: Size, axis: int = 2) -> ir.Value:
        """values[.., start:stop, ..]."""
        where = self.writer.constant([axis], np.int64, name="axis")
        return self.writer.op("Slice", values, self.sizes.value(start), self.sizes.value(stop), where, name="cut")

    def scaled(self, query: ir.Value) -> ir.Value:
        """Queries times what scores are multiplied by."""
        return self.writer.op("Mul", query, self._scale(), name="scaled")

    def _scale(self) -> ir.Value:
        writer, usual = self.writer, self.settings["usual"]
        tokens = self.sizes.plus(self.text, self.image)
        if isinstance(tokens, int) or usual <= 1:
            grown = temperature(tokens, usual) if isinstance(tokens, int) else 1.0
            return writer.constant(np.float32(self.given_scale * grown), name="scale")

        def grown_scale() -> ir.Value:
            logarithm = writer.op("Log", writer.op("Cast", tokens, name="tokens", to=ir.DataType.FLOAT), name="log")
            ratio = writer.op("Div", logarithm, self._number(math.log(usual)), name="ratio")
            root = writer.op("Sqrt", writer.op("Max", ratio, self._number(1), name="growth"), name="temperature")
            return writer.op("Mul", root, self._number(self.given_scale), name="scale")

        return self.once(("scale", _told(self.text), usual, self.given_scale), grown_scale)

    def _number(self, number: float) -> ir.Value:
        return self.writer.constant(np.float32(number), name="number")

    def attended(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """softmax(q k^T) v of scaled queries."""
        writer = self.writer
        scores = writer.op("MatMul", query, self.turned(key), name="scores")
        y = writer.op("MatMul", writer.op("Softmax", scores, name="weights", axis=-1), value, name="attended")
        self.plain |= {scores, y}
        return y

    def turned(self, values: ir.Value, rank: int = 4) -> ir.Value:
        """The last two dimensions in each other's place."""
        order = [*range(rank - 2), rank - 1, rank - 2]
        return self.writer.op("Transpose", values, name="turned", perm=order)


def _order(settings: dict[str, Any]) -> TokenOrder | None:
    return TokenLayout.from_spec({"order": settings.get("order")}).order


def _told(size: Size) -> object:
    return size if isinstance(size, int) else size.name


def _size(value: ir.Value) -> Size:
    known = ir.convenience.get_const_tensor(value)
    return value if known is None else int(known.numpy().reshape(-1)[0])
