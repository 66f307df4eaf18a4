"""Each block of a denoiser as a traced graph for the GPU: inputs quantized once, norm, modulation, activation in that kernel.

torch.compile traces a block's forward, whole or not at all, into a graph of torch's functions, one for all equal blocks. Six
rewrites of it are done before its own compiler goes on:

    1. Of several `ditq::quantized` with the same arguments, as q, k and v have them, one is left.
    2. gelu and the like behind a `ditq::product` that nothing else reads goes into that kernel; but into the one that rounds
       it where the product is one of many FP8 numbers, which the vendor's library computes fastest.
    3. What makes a quantized input goes into its kernel: an activation, layer_norm(z), layer_norm(z) (1 + gamma) + beta with
       gamma and beta of each sample, channels put behind others with or without an activation of theirs. The kernel then reads
       z in its place. What others read as well stays in the graph.
    4. An attention that a part answers for becomes the part's operator (answered_attention.py), a rounded one that of FP8
       numbers (fp8_attention.py).
    5. What makes queries and keys goes into one kernel (traced_heads.py).
    6. Products of one input whose weights lie side by side become one (side_by_side.py).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ditq.errors import DitqError
from ditq.kernels import fp8_attention, heads, operators  # noqa: F401  operators are looked for
from ditq.kernels.answered_attention import Answer, answers_of
from ditq.kernels.asked import answering
from ditq.kernels.blocks import Forward, blocks_of, in_blocks
from ditq.kernels.fp8_attention import FP8Attention, roundings_of
from ditq.kernels.side_by_side import Place, join_products, places
from ditq.kernels.traced_heads import fuse_heads, keeps_all
from ditq.kernels.tuning import MANY
from ditq.numerics.carrier import E4M3

Compiler = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]

_X, _GAMMA, _BETA, _NORM, _EPSILON, _ACTIVATION = 0, 1, 2, 8, 9, 10  # places in the arguments of ditq::quantized
_TAIL = 22  # the argument behind all that are given
_BEHIND = 14  # place of the activation in those of ditq::product
_SAME = {"to", "contiguous", "float", "type_as"}


Places = tuple[tuple[str, Place], ...]
Site = tuple[str, bool | None]
"""A module's name within its block, and whether its FP8 attention rotates queries and keys; None: it is another attention."""


def rewrite(graph: fx.GraphModule, sites: Sequence[Site] = (), where: Places = ()) -> fx.GraphModule:
    """All rewrites, in place.

    sites: of the modules within the block whose attentions parts answer for, in the parts' order. where: its linears' weights
    lie.
    """
    share_inputs(graph)
    fuse_behind(graph)
    fuse_before(graph)
    fuse_heads(graph)
    put_answers(graph, sites)
    names = [name for name, _ in where]
    products = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.product.default)
    named = {node: name for node in products if (name := _module_of(node, names)) is not None}
    join_products(graph, named, dict(where))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _quantizers(graph: fx.GraphModule) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.quantized.default)


def share_inputs(graph: fx.GraphModule) -> None:
    """Leave one of several equal quantizations, and one of each of its results."""
    first: dict[Any, fx.Node] = {}

    def leave_one(nodes: list[fx.Node]) -> None:
        for node in nodes:
            kept = first.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.graph.erase_node(node)

    leave_one(_quantizers(graph))
    for quantizer in _quantizers(graph):
        leave_one([user for user in quantizer.users if user.target is operator.getitem])


def fuse_behind(graph: fx.GraphModule) -> None:
    """Take activations into the products that they follow."""
    for product in graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.product.default):
        last = product
        while len(last.users) == 1 and _is_view(user := next(iter(last.users)), last):
            last = user
        user = next(iter(last.users)) if len(last.users) == 1 else None
        if user is None or (_of_library(product) and _rounded_next(user)):
            continue
        if (activation := _activation(user)) and user.args[0] is last:
            product.args = (*product.args[:_BEHIND], activation, *product.args[_BEHIND + 1 :])
            user.replace_all_uses_with(last)
            graph.graph.erase_node(user)


def _of_library(product: fx.Node) -> bool:
    """Whether the vendor's library is likely to compute it: in FP8, for many tokens."""
    x = product.args[0].meta.get("example_value") if isinstance(product.args[0], fx.Node) else None
    return isinstance(x, Tensor) and x.dtype == E4M3 and len(x) >= MANY


def _rounded_next(node: fx.Node) -> bool:
    """Whether all that reads the node, by itself or behind other channels, is the rounding of an input."""
    if not node.users:
        return False
    for user in node.users:
        if _is_view(user, node) or (_is_pair(user) and _pair(user)[1] is node):
            if not _rounded_next(user):
                return False
        elif not (user.target is torch.ops.ditq.quantized.default and user.args[_X] is node):
            return False
    return True


def _is_pair(node: fx.Node) -> bool:
    """Whether it puts the channels of one tensor behind those of another."""
    if not _is(node, torch.cat) or len(node.args[0]) != 2:  # type: ignore[arg-type]
        return False
    dim, last = _argument(node, 1, "dim", 0), len(_shape(node)) - 1
    return last > 0 and dim in (-1, last)


def _pair(node: fx.Node) -> tuple[Any, Any]:
    pieces: Any = node.args[0]
    return pieces[0], pieces[1]


def _is_view(node: fx.Node, of: fx.Node) -> bool:
    return node.op == "call_method" and node.target in _SAME | {"view", "reshape"} and node.args[0] is of


def fuse_before(graph: fx.GraphModule) -> None:
    """Take what makes a quantized input into the kernel that reads it."""
    for node in _quantizers(graph):
        value = _behind(node.args[_X])
        if value is None:
            continue
        arguments = list(node.args)
        activation = _activation(value)
        modulated = _modulated(value)
        if _is_pair(value):
            arguments[_X], tail = _pair(value)
            active = _behind(tail)
            if active is not None and (activation := _activation(active)):
                tail, arguments[_ACTIVATION] = active.args[0], activation
            arguments[_TAIL:] = [tail]
        elif activation:
            arguments[_X], arguments[_ACTIVATION] = value.args[0], activation
        elif modulated is not None:
            norm, arguments[_GAMMA], arguments[_BETA] = modulated
            arguments[_X], arguments[_NORM] = norm.args[0], True
            arguments[_EPSILON] = _argument(norm, 4, "eps", 1e-5)
        node.args = tuple(arguments)


def put_answers(graph: fx.GraphModule, sites: Sequence[Site]) -> None:
    """Let parts answer for the attentions of these modules.

    Raises:
        DitqError: a part whose module computes no attention in this graph.
    """
    found, outputs, names = set(), [], [name for name, _ in sites]
    for node in graph.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        site = _module_of(node, names)
        if site is None:
            continue
        found.add(site)
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
        given |= node.kwargs
        if given.get("attn_mask") is not None or given.get("dropout_p") or given.get("is_causal"):
            raise DitqError(
                f"{site}: target 'cuda' has no windows, no linear and no FP8 attention with a mask or with dropout"
            )
        place, scale = names.index(site), given.get("scale")
        arguments = (given["query"], given["key"], given["value"])
        rotate = dict(sites)[site]
        if rotate is not None:
            outputs.append(fp8_attention.put(graph, node, arguments, place, scale, rotate))
        else:
            node.target = torch.ops.ditq.answered_attention.default
            node.args, node.kwargs = (*arguments, place, scale), {}
    fp8_attention.read_as_fp8(graph, outputs)
    if missing := sorted(set(names) - found):
        raise _no_attention(missing[0])


def _no_attention(site: str) -> DitqError:
    return DitqError(f"{site}: torch {torch.__version__} traces no attention there; set target: torch")


def _module_of(node: fx.Node, sites: Iterable[str]) -> str | None:
    """The one of these modules in whose forward a node was traced."""
    inside = {_path(str(entry[0])) for entry in node.meta.get("nn_module_stack", {}).values()}
    return next((site for site in sites if site in inside), None)


def _path(source: str) -> str:
    """blocks.0.attn of what Dynamo calls L['self'].__dict__['_modules']['blocks'].0.attn, or the like in other versions.

    What stands around a forward, as of blocks in parallel, is passed through to the module that it belongs to.
    """
    words: list[str] = []
    for word in re.findall(r"\w+", source):
        if word == "__self__":
            while words and words[-1] in {"fn", "forward", "inner"}:
                words.pop()
        elif word not in {"L", "self", "__dict__", "_modules"}:
            words.append(word)
    return ".".join(words)


def _is(node: Any, function: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _behind(value: Any) -> fx.Node | None:
    """The node that `value` is another name for."""
    while isinstance(value, fx.Node):
        same = value.op == "call_method" and value.target in _SAME
        dropped = _is(value, F.dropout) and (
            not _argument(value, 1, "p", 0.5) or not _argument(value, 2, "training", True)
        )
        if not (same or dropped):
            return value
        value = value.args[0]
    return None


def _activation(node: fx.Node) -> str:
    if _is(node, F.gelu):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return "silu" if _is(node, F.silu) else ""


def _modulated(node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
    """(layer_norm, gamma, beta) of which `node` is made, gamma and beta None for a plain norm."""
    if _plain_norm(node):
        return node, None, None
    for scaled, beta in _operands(node, operator.add):
        product = _behind(scaled)
        if product is None or not _a_sample(beta, node):
            continue
        for normed, factor in _operands(product, operator.mul):
            norm = _behind(normed)
            gamma = _plus_one(factor)
            if norm is not None and gamma is not None and _plain_norm(norm) and _a_sample(factor, node):
                return norm, gamma, beta
    return None


def _plain_norm(node: fx.Node) -> bool:
    """A layer norm over the channels without weight and bias."""
    if not _is(node, F.layer_norm):
        return False
    bare = _argument(node, 2, "weight", None) is None and _argument(node, 3, "bias", None) is None
    return bare and len(_argument(node, 1, "normalized_shape", ())) == 1


def _operands(node: fx.Node, function: Any) -> list[tuple[Any, Any]]:
    """The two operands, in both orders."""
    if not _is(node, function) or len(node.args) != 2:
        return []
    return [(node.args[0], node.args[1]), (node.args[1], node.args[0])]


def _plus_one(node: Any) -> Any:
    """gamma of 1 + gamma, or of (1 + gamma)[:, None], or None."""
    if _is(node, operator.getitem):
        if not keeps_all(node.args[1]):
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    return next(
        (gamma for one, gamma in _operands(node, operator.add) if isinstance(one, int | float) and one == 1), None
    )


def _a_sample(value: Any, tokens: fx.Node) -> bool:
    """Whether `value` is one vector of channels for each sample of `tokens` [B, T, n], or for all of them."""
    if not isinstance(value, fx.Node):
        return False
    shape, whole = _shape(value), _shape(tokens)
    if len(whole) != 3 or not shape or shape[-1] != whole[-1]:
        return False
    return shape in ((whole[0], 1, whole[2]), (1, 1, whole[2]), (1, whole[2]), (whole[2],))


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def inductor(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """torch's own compiler."""
    from torch._inductor.compile_fx import compile_fx

    compile_whole: Callable[..., Any] = compile_fx
    return compile_whole(graph, inputs)


def compiled(model: nn.Module, inner: Compiler = inductor) -> Forward:
    """The model's call, its blocks compiled in place: each traced as one graph for each combination of shapes and rewritten.

    What is left is compiled by `inner`. Equal blocks, with parts that answer for the same of their attentions, share the graph.

    Raises:
        DitqError: a part that answers for an attention outside of the blocks.
    """
    answers: dict[str, Answer | FP8Attention] = {**answers_of(model), **roundings_of(model)}
    own: dict[str, dict[str, Answer | FP8Attention]] = {name: {} for name in blocks_of(model)}
    for site, answer in answers.items():
        block = next((name for name in own if not name or site.startswith(f"{name}.")), None)
        if block is None:
            raise _no_attention(site)
        own[block][site.removeprefix(f"{block}.")] = answer
    backends: dict[tuple[tuple[Site, ...], Places], Compiler] = {}
    where = {name: places(block) for name, block in blocks_of(model).items()}

    def compile_block(name: str, forward: Forward) -> Forward:
        sites = tuple(
            (site, part.rotates if isinstance(part, FP8Attention) else None) for site, part in own[name].items()
        )
        backend = backends.setdefault((sites, where[name]), partial(_compile, sites, where[name], inner))
        traced: Forward = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)
        parts = tuple(own[name].values())

        def call(*arguments: Any, **keywords: Any) -> Any:
            with answering(parts):
                return traced(*arguments, **keywords)

        return call if parts else traced

    return in_blocks(model, compile_block)


def _compile(
    sites: Sequence[Site], where: Places, inner: Compiler, graph: fx.GraphModule, inputs: list[Tensor]
) -> Callable[..., Any]:
    return inner(rewrite(graph, sites, where), inputs)
