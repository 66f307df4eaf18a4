"""In a traced block, what makes the queries and keys of an attention, found and replaced by one kernel (heads.py).

    x.unflatten(-1, (h, d)) -> rms_norm -> cat of text and image -> rotary embedding of neighbouring channels -> permute

as FLUX has it in diffusers. Of norm, cat and rotary embedding any may be absent, but not norm and rotary embedding both.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ditq.kernels.heads import NORM, ROTARY, ROTATED, WEIGHT


@dataclass(frozen=True)
class _Made:
    """What `ditq::heads` takes of a part, but for the rounding. steps: see heads.py."""

    pieces: list[fx.Node]
    steps: int = 0
    weights: tuple[fx.Node, ...] = ()
    epsilon: float = 0.0
    cos: fx.Node | None = None
    sin: fx.Node | None = None


def fuse_heads(graph: fx.GraphModule) -> None:
    """Let one kernel make the queries and keys of which all is known, wherever torch's attention reads them."""
    for node in graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        found = {}
        for place, name in enumerate(("query", "key")):
            given = node.args[place] if len(node.args) > place else node.kwargs.get(name)
            made = _found(given)
            if made is not None:
                found[given] = made
        if found:
            with graph.graph.inserting_before(node):
                turned = _put(graph, list(found.values()), None)
            for given, x in zip(found, turned, strict=True):
                node.replace_input_with(given, x)


def rounded(graph: fx.GraphModule, given: Sequence[fx.Node], factors: fx.Node, rotate: Sequence[bool]) -> list[fx.Node]:
    """These tensors [B, h, T, d] in FP8, rotated or not, each times its factor; by the kernel that makes them, if one does."""
    parts = [_source(x) or _Made(pieces_of(graph, x)) for x in given]
    turned = [replace(part, steps=part.steps | ROTATED) if on else part for part, on in zip(parts, rotate, strict=True)]
    return _put(graph, turned, factors)


def _put(graph: fx.GraphModule, parts: Sequence[_Made], factors: fx.Node | None) -> list[fx.Node]:
    """Nodes [B, h, T, d] of what the kernel makes of the parts, of which those with the same tables share an operator."""
    tables = {(part.cos, part.sin) for part in parts if part.steps & ROTARY}
    groups = [list(parts)] if len(tables) < 2 else [[part] for part in parts]
    found: list[fx.Node] = []
    for group in groups:
        cos, sin = next(((part.cos, part.sin) for part in group if part.steps & ROTARY), (None, None))
        own = None if factors is None else graph.graph.call_method("narrow", (factors, 0, len(found), len(group)))
        arguments = (
            [piece for part in group for piece in part.pieces],
            [len(part.pieces) for part in group],
            [part.steps for part in group],
            [weight for part in group for weight in part.weights],
            [part.epsilon for part in group],
            cos,
            sin,
            own,
        )
        made = graph.graph.call_function(torch.ops.ditq.heads.default, arguments)
        for number in range(len(group)):
            y = graph.graph.call_function(operator.getitem, (made, number))
            found.append(graph.graph.call_method("transpose", (y, 1, 2)))
    return found


def _source(x: fx.Node) -> _Made | None:
    """What `_put` was given for x."""
    y: Any = x.args[0] if _calls(x, "transpose") else None
    made: Any = y.args[0] if _is(y, operator.getitem) else None
    if not _is(made, torch.ops.ditq.heads.default):
        return None
    number: Any = y.args[1]
    pieces, counts, steps, weights, epsilons, cos, sin, _ = made.args
    start, stop = sum(counts[:number]), sum(counts[: number + 1])
    weighted = [bool(step & WEIGHT) for step in steps]
    before = sum(count for count, own in zip(counts[:number], weighted, strict=False) if own)
    own = tuple(weights[before : before + counts[number]]) if weighted[number] else ()
    tables = (cos, sin) if steps[number] & ROTARY else (None, None)
    return _Made(list(pieces[start:stop]), steps[number], own, epsilons[number], *tables)


def pieces_of(graph: fx.GraphModule, x: fx.Node) -> list[fx.Node]:
    """The tensors [B, T_i, h, d] whose tokens, one behind the other, are those of x [B, h, T, d], which need not be made."""
    if not _heads_and_tokens_swapped(x):
        return [graph.graph.call_method("transpose", (x, 1, 2))]
    source: Any = x.args[0]
    return list(source.args[0]) if _behind_each_other(source) else [source]


def _behind_each_other(node: fx.Node) -> bool:
    return _is(node, torch.cat) and _argument(node, 1, "dim", 0) == 1


def _found(given: Any) -> _Made | None:
    """How a query or key [B, h, T, d] of an attention is made."""
    if not isinstance(given, fx.Node) or not _heads_and_tokens_swapped(given):
        return None
    x: Any = given.args[0]
    shape = _shape(given)
    cos = sin = None
    rotary = _rotary(x)
    if rotary is not None:
        x, cos, sin = rotary
        if any(_numel(table) != shape[2] * shape[3] for table in (cos, sin)):
            return None
    pieces = [x]
    if _behind_each_other(x):
        pieces = list(x.args[0])
    norms = [_norm(piece) for piece in pieces]
    steps = 0 if rotary is None else ROTARY
    if all(norm is None for norm in norms):
        return None if rotary is None else _Made(pieces, steps, (), 0.0, cos, sin)
    if any(norm is None for norm in norms):
        return _Made([x], steps, (), 0.0, cos, sin) if rotary is not None else None
    sources, weights, epsilons = zip(*(norm for norm in norms if norm is not None), strict=True)
    own = [weight for weight in weights if weight is not None]
    if len(set(epsilons)) > 1 or len(own) not in (0, len(weights)):
        return None
    return _Made(list(sources), steps | NORM | (WEIGHT if own else 0), tuple(own), epsilons[0], cos, sin)


def _heads_and_tokens_swapped(node: fx.Node) -> bool:
    if node.op != "call_method" or len(_shape(node)) != 4:
        return False
    if node.target == "permute":
        order = node.args[1:] if len(node.args) > 2 else node.args[1]
        return tuple(order) == (0, 2, 1, 3)  # type: ignore[arg-type]
    return node.target == "transpose" and set(node.args[1:]) == {1, 2}


def _rotary(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) of (x cos + (-x_1, x_0, ..) sin) in x's dtype."""
    total: Any = node.args[0] if _calls(node, "to") else None
    if not _is(total, operator.add):
        return None
    products = [product for product in total.args if _is(product, operator.mul)]
    if len(products) != 2:
        return None
    for plain, turned in (products, products[::-1]):
        x, cos = (_without_float(factor) for factor in plain.args)
        pairs, sin = (_without_float(factor) for factor in turned.args)
        if isinstance(x, fx.Node) and _turned(pairs) is x and _dtype(node) == _dtype(x):
            return x, _unindexed(cos), _unindexed(sin)
    return None


def _unindexed(node: Any) -> Any:
    """The table that queries and keys both index as they need it."""
    while _is(node, operator.getitem) and keeps_all(node.args[1]):
        node = _without_float(node.args[0])
    return node


def keeps_all(index: Any) -> bool:
    """Whether what is indexed so holds all of the values, in their order: [:, None] and the like."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _turned(node: Any) -> fx.Node | None:
    """x of stack((-x_1, x_0), -1).flatten: neighbouring channels as real and imaginary parts."""
    stack: Any = node.args[0] if _calls(node, "flatten") else None
    if not _is(stack, torch.stack) or _argument(stack, 1, "dim", 0) not in (-1, 4):
        return None
    negative, real = stack.args[0]
    if not _is(negative, operator.neg):
        return None
    parts = [negative.args[0], real]
    if not all(_is(part, operator.getitem) for part in parts) or [part.args[1] for part in parts] != [1, 0]:
        return None
    unbound = parts[0].args[0]
    if (
        unbound is not parts[1].args[0]
        or not _calls(unbound, "unbind")
        or _argument(unbound, 1, "dim", 0) not in (-1, 4)
    ):
        return None
    split = unbound.args[0]
    shaped = (_calls(split, "reshape") or _calls(split, "unflatten")) and _shape(split)[-1] == 2
    return split.args[0] if shaped else None


def _norm(node: Any) -> tuple[fx.Node, fx.Node | None, float] | None:
    """(x, weight, epsilon) of an RMS norm over the channels of each head."""
    if not (_is(node, torch.rms_norm) or _is(node, F.rms_norm)):
        return None
    epsilon = _argument(node, 3, "eps", None)
    one = len(_argument(node, 1, "normalized_shape", ())) == 1
    return (node.args[0], _argument(node, 2, "weight", None), float(epsilon)) if one and epsilon is not None else None


def _without_float(node: Any) -> Any:
    while _calls(node, "float") or (_calls(node, "to") and _dtype(node) in (torch.float32, _dtype(node.args[0]))):
        node = node.args[0]
    return node


def _is(node: Any, function: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def _calls(node: Any, method: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == method


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _shape(node: Any) -> Sequence[int]:
    value = _value(node)
    return () if value is None else tuple(value.shape)


def _numel(node: Any) -> int:
    value = _value(node)
    return -1 if value is None else value.numel()


def _dtype(node: Any) -> torch.dtype | None:
    value = _value(node)
    return None if value is None else value.dtype
