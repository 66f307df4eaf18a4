"""Puts what a target makes of each quantized linear in the place of its node, and writes down where that stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ditq.export.lowering.transforms import apply_transform, fingerprint
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


Make = Callable[[ir.Value, int, QuantLinear], Made]
"""(transformed input, its number of dimensions, layer) -> what the target makes of them."""


def lower_layers(writer: Writer, layers: Mapping[str, QuantLinear], make: Make) -> list[PlannedMatMul]:
    """Replace every ditq::QuantLinear of the graph by its transform and what `make` writes, in place.

    Layers that read the same value through the same transform share it.
    """
    graph = writer.graph
    transformed: dict[tuple[ir.Value, str], ir.Value] = {}
    planned = []
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != "QuantLinear":
            continue
        layer = layers[node.attributes["site"].as_string()]
        writer.move(node, layer.site)
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        rank = len(x.shape)
        key = (x, fingerprint(layer.transform))
        if key not in transformed:
            transformed[key] = apply_transform(writer, x, rank, layer.in_features, layer.transform)
        made = make(transformed[key], rank, layer)
        planned.append(_placed(writer, node, layer, made))
    writer.model.graph.opset_imports.pop(DOMAIN, None)
    return planned


def _placed(writer: Writer, node: ir.Node, layer: QuantLinear, made: Made) -> PlannedMatMul:
    """Take the node out of the graph in favour of what was made."""
    x, y, result = node.inputs[0], made.output, node.outputs[0]
    y.shape, y.type = result.shape, result.type
    result.replace_all_uses_with(y, replace_graph_outputs=True)
    if y.is_graph_output():
        y.name = result.name
    writer.graph.remove(node, safe=True)
    inner = None if made.inner is None else made.inner.name
    assert x is not None and x.name is not None and made.product.name is not None and y.name is not None
    groups = tuple(product.name or "" for product in made.groups)
    return PlannedMatMul(layer.site, made.kind, x.name, made.product.name, y.name, inner, groups=groups)
