"""Puts what a target makes of each quantized linear in the place of its node, and writes down where that stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as cleanups

from ditq.export.lowering.transforms import apply_transform, fingerprint, joined_from
from ditq.export.lowering.writer import Writer
from ditq.export.onnx_graph import DOMAIN
from ditq.export.targets import Kind, PlannedMatMul
from ditq.nn import QuantLinear


@dataclass(frozen=True, eq=False)
class Made:
    """What a layer became. product: its matmul's own output, or the sum of its `groups`'; inner: that of a branch which
    reads integers and has a matmul of its own."""

    kind: Kind
    product: ir.Value
    output: ir.Value
    inner: ir.Value | None = None
    groups: Sequence[ir.Value] = ()


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a value that an expert reads: `source` [..., I], and which, as numbers into all of its rows."""

    source: ir.Value
    numbers: ir.Value


Make = Callable[[ir.Value, int, QuantLinear, ir.Value | None], Made]
"""(transformed input, its number of dimensions, layer, which rows of it the layer reads or None for all) -> what the target
makes of them."""


def rows_of(x: ir.Value) -> Rows | None:
    """What x was looked up in, if it is Gather(Reshape(source to [rows, I]), numbers)."""
    node = x.producer()
    if node is None or node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
        return None
    lines, numbers = node.inputs
    flat = None if lines is None else lines.producer()
    if lines is None or numbers is None or flat is None or flat.op_type != "Reshape" or lines.is_initializer():
        return None
    source = flat.inputs[0]
    if source is None or source.shape is None or lines.shape is None or source.shape[-1] != lines.shape[-1]:
        return None
    return Rows(source, numbers)


def choose_rows(writer: Writer, value: ir.Value, width: int, numbers: ir.Value) -> ir.Value:
    """Rows of value [..., width]."""
    shape = writer.constant([-1, width], np.int64, name="shape")
    return writer.op("Gather", writer.op("Reshape", value, shape, name="lines"), numbers, name="rows", axis=0)


def lower_layers(
    writer: Writer, layers: Mapping[str, QuantLinear], make: Make, rows_last: bool = False
) -> list[PlannedMatMul]:
    """Replace every ditq::QuantLinear of the graph by its transform and what `make` writes, in place.

    Layers that read the same value through the same transform share it. With `rows_last`, layers that read some rows of it
    share it too, and `make` chooses the rows.
    """
    graph = writer.graph
    transformed: dict[tuple[ir.Value, str], ir.Value] = {}
    joined: dict[str, tuple[str, ...]] = {}  # the transform may take what a value is joined from instead of it
    planned = []
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != "QuantLinear":
            continue
        layer = layers[node.attributes["site"].as_string()]
        writer.move(node, layer.site)
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        rows = rows_of(x) if rows_last and layer.activation.granularity == "token" and not layer.rank else None
        read = x if rows is None else rows.source
        assert read.shape is not None
        rank = len(read.shape)
        joined[read.name or ""] = tuple(value.name or "" for value in joined_from(read))
        key = (read, fingerprint(layer.transform))
        if key not in transformed:
            transformed[key] = apply_transform(writer, read, rank, layer.in_features, layer.transform)
        made = make(transformed[key], rank, layer, None if rows is None else rows.numbers)
        planned.append(_placed(writer, node, layer, made, rows))
    # What layers read whose rows are now chosen later: no runtime would leave it out by itself.
    cleanups.RemoveUnusedNodesPass()(writer.model)
    writer.model.graph.opset_imports.pop(DOMAIN, None)
    held = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    held |= {value.name for node in graph for value in node.outputs}
    return [entry if entry.input in held else replace(entry, parts=joined[entry.input]) for entry in planned]


def _placed(writer: Writer, node: ir.Node, layer: QuantLinear, made: Made, rows: Rows | None) -> PlannedMatMul:
    """Take the node out of the graph in favour of what was made."""
    x, y, result = node.inputs[0] if rows is None else rows.source, made.output, node.outputs[0]
    y.shape, y.type = result.shape, result.type
    result.replace_all_uses_with(y, replace_graph_outputs=True)
    if y.is_graph_output():
        y.name = result.name
    writer.graph.remove(node, safe=True)
    inner = None if made.inner is None else made.inner.name
    assert x is not None and x.name is not None and made.product.name is not None and y.name is not None
    groups = tuple(product.name or "" for product in made.groups)
    numbers = None if rows is None else rows.numbers.name
    return PlannedMatMul(layer.site, made.kind, x.name, made.product.name, y.name, inner, groups=groups, rows=numbers)
