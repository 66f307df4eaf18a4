"""Linears that read one input, as q, k and v do, computed as one product: their weights lie one after the other in GPU memory.

A product of three times as many outputs fills the GPU better than three, and its weight is written out in full by one launch.
`lay` puts weights of one form, of linears of one module, side by side; which of them read the same input is seen when a
block is traced, and `join_products` lets those be one product. Each linear still works by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.library import custom_op

from ditq.kernels.fast_linear import FastLinear
from ditq.kernels.matmul import Product
from ditq.kernels.product import computed
from ditq.kernels.storage import StoredWeight, stack, why_not_stacked
from ditq.kernels.tuning import MANY

Place = tuple[str, int]  # of a linear: its stack, and its number there


def stacks(model: nn.Module) -> Iterator[tuple[str, dict[str, FastLinear]]]:
    """(name, linears by name in their order) of each stack: linears of one module whose weights can be one."""
    for parent, module in model.named_modules():
        linears = {name: layer for name, layer in module.named_children() if isinstance(layer, FastLinear)}
        left = {name: layer for name, layer in linears.items() if layer.up is None and layer.stored.bits in (4, 8)}
        while left:
            first = next(iter(left.values()))
            alike = {name: layer for name, layer in left.items() if _alike(first, layer)}
            left = {name: layer for name, layer in left.items() if name not in alike}
            if len(alike) > 1:
                prefix = f"{parent}." if parent else ""
                yield f"{prefix}{next(iter(alike))}", {prefix + name: layer for name, layer in alike.items()}


def _alike(first: FastLinear, other: FastLinear) -> bool:
    return why_not_stacked([first.stored, other.stored]) is None and (first.bias is None) == (other.bias is None)


def lay(model: nn.Module) -> None:
    """Put the weights of each stack one after the other, in place: each linear keeps its part of them."""
    for _, linears in stacks(model):
        layers = list(linears.values())
        whole, count = stack([layer.stored for layer in layers]), len(layers)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.stack(biases) if biases else None
        for place, layer in enumerate(layers):
            parts: dict[str, Any] = {
                f.name: _part(value, place, count)
                for f in fields(whole)
                if isinstance(value := getattr(whole, f.name), Tensor)
            }
            if whole.tables is not None and not layer.stored.table_a_row:
                parts["tables"] = whole.tables[place]
            layer.stored = replace(layer.stored, **parts)
            layer.bias = None if bias is None else bias[place]


def _part(whole: Tensor, place: int, count: int) -> Tensor:
    return whole.unflatten(0, (count, -1))[place]


def places(block: nn.Module) -> tuple[tuple[str, Place], ...]:
    """Where the linears of a block lie, by their names."""
    return tuple((name, (which, place)) for which, linears in stacks(block) for place, name in enumerate(linears))


def join_products(graph: fx.GraphModule, named: Mapping[fx.Node, str], where: Mapping[str, Place]) -> None:
    """Make one node of the products of one input whose weights lie side by side. named: the linear that each is of."""
    found: dict[tuple[object, ...], list[tuple[int, fx.Node]]] = {}
    for node, name in named.items():
        x = node.args[0].meta.get("example_value") if isinstance(node.args[0], fx.Node) else None
        plain = node.args[7] is None and node.args[14] == ""  # nothing is added, no activation follows
        if name in where and plain and isinstance(x, Tensor) and len(x) >= MANY:
            which, place = where[name]
            found.setdefault((which, *node.args[:2]), []).append((place, node))
    for nodes in found.values():
        nodes.sort(key=lambda entry: entry[0])
        for _, run in groupby(enumerate(nodes), key=lambda entry: entry[1][0] - entry[0]):
            beside = [node for _, (_, node) in run]
            if len(beside) > 1:
                _join(graph, beside)


def _join(graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    def each(place: int) -> list[Any]:
        return [node.args[place] for node in nodes if node.args[place] is not None]

    first = nodes[0]
    rows, rest = first.args[8], first.args[9:14]
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    with graph.graph.inserting_before(min(nodes, key=order.__getitem__)):
        given: tuple[Any, ...] = (*first.args[:2], *map(each, range(2, 7)), rows, *rest, first.args[15])
        joined = graph.graph.call_function(torch.ops.ditq.products.default, given)
        for number, node in enumerate(nodes):
            node.replace_all_uses_with(graph.graph.call_method("narrow", (joined, 1, number * rows, rows)))  # type: ignore[operator]
    for node in nodes:
        graph.graph.erase_node(node)


@custom_op("ditq::products", mutates_args=())
def products(
    x: Tensor,
    x_scale: Tensor | None,
    data: Sequence[Tensor],
    tables: Sequence[Tensor],
    multiplier: Sequence[Tensor],
    scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    rows: int,
    columns: int,
    bits: int,
    run: int,
    group: int,
    float8: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, count N] of x [M, K] by weights [N, K] of one form, one after the other, as `ditq::product` of each."""
    count = len(data)
    own = [table if table.dim() == 2 else table[None] for table in tables]
    parts = [joined(part) for part in (data, own, multiplier, scale, bias)]
    assert parts[0] is not None and parts[3] is not None
    stored = StoredWeight(count * rows, columns, bits, run, parts[0], parts[1], parts[2], parts[3], group, float8)
    return computed(Product(x.contiguous(), x_scale, stored, parts[4]), dtype)


@products.register_fake
def _(x, x_scale, data, tables, multiplier, scale, bias, rows, columns, bits, run, group, float8, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], len(data) * rows), dtype=dtype)


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """[count n, ..] of tensors [n, ..], without a copy where they lie one after the other; None of none."""
    if not parts:
        return None
    first, size = parts[0], parts[0].nbytes
    together = first.untyped_storage().data_ptr()
    beside = all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == together
        and part.data_ptr() == first.data_ptr() + i * size
        for i, part in enumerate(parts)
    )
    if not beside:
        return torch.cat(list(parts))
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())
