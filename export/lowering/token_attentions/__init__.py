"""Token attentions (nn/structural/token_attention.py) as plain ONNX operators. One file a kind; nothing else lists them.

Rules:
  1. Reshape, Gather, MatMul, Softmax, plain Attention and arithmetic alone: no NonZero, no ScatterND, nothing whose shape
     depends on values but for the size of the picture where a model is told it by positions.
  2. Indices are constants where the picture's size is fixed, else made of it once for all attentions.
  3. All is computed in float32, scores and sums over tokens included.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import onnx_ir as ir

from ditq.errors import DitqError
from ditq.export.lowering.attention import put_in_place
from ditq.export.lowering.token_attentions.tokens import Tokens
from ditq.export.lowering.writer import Writer
from ditq.export.onnx_graph import DOMAIN, TOKEN_ATTENTION

Lowering = Callable[[Tokens], ir.Value]

_lowerings: dict[str, Lowering] = {}


def lowers(kind: str) -> Callable[[Lowering], Lowering]:
    """Decorator of the function that writes the attention of a `TokenAttention` of that kind."""

    def register(function: Lowering) -> Lowering:
        _lowerings[kind] = function
        return function

    return register


def lower_token_attentions(model: ir.Model) -> dict[str, set[ir.Value]]:
    """Rewrite every ditq::TokenAttention of the graph, in place: all values that those of each kind compute, but for the
    products of plain softmax attention among them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    writer = Writer(model)
    shared: dict[tuple[object, ...], ir.Value] = {}
    made: dict[str, set[ir.Value]] = {}
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == TOKEN_ATTENTION:
            kind, before = node.attributes["kind"].as_string(), set(model.graph)
            if kind not in _lowerings:
                raise DitqError(
                    f"{node.attributes['site'].as_string()}: a graph has no form for {kind.replace('_', ' ')}; compile for "
                    "another target, or take the pass out of the recipe"
                )
            tokens = Tokens(writer, node, shared)
            put_in_place(writer, node, _lowerings[kind](tokens))
            new = set(model.graph) - before
            made.setdefault(kind, set()).update({value for maker in new for value in maker.outputs} - tokens.plain)
    return made
