"""The part of a transformer that sees only the text, as a graph of its own: it runs once for a prompt, not once a step.

The keys and values of cross attention are made of the text alone, which stays the same along a sampling trajectory. What
moves over is told by the flow of the data: every node that none of the changing inputs reaches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes import common as cleanups


def split_text(model: ir.Model, changing: Collection[str], timed: Collection[str] = ()) -> ir.Model | None:
    """Take what does not depend on the arguments `changing` out of `model`, in place, into a graph of its own.

    The values that `model` still needs of it are the new graph's outputs and further inputs of `model`: `text.0`, `text.1`,
    ... An input that only the new graph reads is no longer an input of `model`.

    Args:
        timed: sites of quantized layers that will read the timestep, though the graph does not show it yet.

    Returns:
        The new graph, or None if there is nothing to take out; `model` is then as it was.
    """
    steady = {value for value in model.graph.inputs if _argument(value) not in changing}
    twins = _twins(model.graph, steady)
    sizes = _of_sizes(model.graph, twins)
    cut = [value for value in dict.fromkeys(_crossing(model.graph, steady, timed)) if value not in sizes]
    if not cut:
        return None
    for index, value in enumerate(cut):
        value.name = f"text.{index}"
    text = model.clone()
    made = {value.name: value for node in text.graph for value in node.outputs}
    text.graph.outputs[:] = [made[value.name] for value in cut]
    for node, (twin, dimension) in twins.items():
        node.replace_input_with(0, twin)
        node.attributes["start"], node.attributes["end"] = (
            ir.AttrInt64("start", dimension),
            ir.AttrInt64("end", dimension + 1),
        )
    for value in cut:
        given = ir.Value(name=value.name, shape=_known(value.shape), type=value.type)
        value.replace_all_uses_with(given, replace_graph_outputs=True)
        value.name = None  # its node goes away
        model.graph.inputs.append(given)
    for part in (text, model):
        cleanups.RemoveUnusedNodesPass()(part)
        unread = [value for value in part.graph.inputs if not value.uses() and not value.is_graph_output()]
        for value in unread:
            part.graph.inputs.remove(value)
    return text


def _twins(graph: ir.Graph, steady: Collection[ir.Value]) -> dict[ir.Node, tuple[ir.Value, int]]:
    """Nodes that read one named size off a steady input, and the changing input and dimension that have it as well.

    There the graph of every step reads it, such as the batch: it needs no input for that.
    """
    named = {
        str(size.value): (value, dimension)
        for value in graph.inputs
        if value not in steady
        for dimension, size in enumerate(value.shape or ())
        if isinstance(size, ir.SymbolicDim)
    }
    twins = {}
    for node in graph:
        x = node.inputs[0] if node.op_type == "Shape" else None
        if x is None or x not in steady or not x.is_graph_input() or x.shape is None or "end" not in node.attributes:
            continue
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        size = x.shape[start]
        name = str(size.value) if isinstance(size, ir.SymbolicDim) else ""
        if node.attributes["end"].as_int() == start + 1 and name in named:
            twins[node] = named[name]
    return twins


def _of_sizes(graph: ir.Graph, twins: Collection[ir.Node]) -> set[ir.Value]:
    """What is made of those sizes and constants alone."""
    found: set[ir.Value] = set()
    fixed: set[ir.Value] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if node in twins:
            found.update(node.outputs)
        elif all(value in fixed or value.is_initializer() for value in given):
            fixed.update(node.outputs)
        elif all(value in found or value in fixed or value.is_initializer() for value in given):
            found.update(node.outputs)
    return found


def _known(shape: ir.Shape | None) -> ir.Shape | None:
    """The shape without the exporter's names of dimensions, which the graph's own inputs do not go by."""
    return None if shape is None else ir.Shape([size if isinstance(size, int) else None for size in shape])


def _argument(value: ir.Value) -> str:
    """The forward's argument that a graph input belongs to (export/arguments.py has the names)."""
    return (value.name or "").partition(".")[0]


def _crossing(graph: ir.Graph, steady: set[ir.Value], timed: Collection[str]) -> Iterator[ir.Value]:
    """Values made of steady inputs alone that meet a changing one, or leave the graph."""
    fixed: set[ir.Value] = set()  # of no input at all, such as a turned weight: made again wherever it is read
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        stays = any(attribute.type in _GRAPHS for attribute in node.attributes.values()) or _site(node) in timed
        if not stays and all(value in fixed or value.is_initializer() for value in given):
            fixed.update(node.outputs)
        elif not stays and all(value in fixed or value in steady or value.is_initializer() for value in given):
            steady.update(node.outputs)
        else:
            yield from _made(given, steady)
    yield from _made(graph.outputs, steady)


def _site(node: ir.Node) -> str | None:
    return node.attributes["site"].as_string() if node.op_type == "QuantLinear" else None


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _made(values: Sequence[ir.Value], steady: set[ir.Value]) -> list[ir.Value]:
    return [value for value in values if value in steady and not value.is_graph_input()]
