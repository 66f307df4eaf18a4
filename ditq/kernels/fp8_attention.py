"""Attention of FP8 numbers by cuDNN, where a recipe has `quantize_attention` in FP8 with static scales.

    O = n(n(P) n(V / s_v)) s_v,  P = exp(S - max S) / sum,  S = n(Q / s_q) n(K / s_k)^T s_q s_k / sqrt(d),  n: to e4m3

Queries, keys and values are rounded by the kernel of heads.py, from where they lie. What reads the output multiplies it by
s_v: the kernel that rounds the next linear's input, where that alone reads it. In between is one operator. cuDNN's kernels
want one scale a tensor, channels a multiple of 16, and on Hopper an output in FP8; a mean of values never exceeds them, so
s_v is the output's scale too.

Needs `nvidia-cudnn-frontend` and compute capability 9.0. On a CPU the operator computes its meaning.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.library import custom_op

from ditq.errors import DitqError
from ditq.kernels.asked import asked
from ditq.kernels.traced_heads import pieces_of, rounded
from ditq.nn.answered_attention import unanswer
from ditq.nn.attention_rounding import AttentionRounding
from ditq.numerics.attention_rounding import FLOAT8, LARGEST_OF_P, PARTS, AttentionFormat, rounded_attention
from ditq.numerics.carrier import E4M3

INSTALL = "pip install 'ditq[fp8-attention]'"
LEAST = 90  # compute capability 9.0
_SETTINGS = "{format: float8_e4m3, parts: qkvpo, scales: static, smooth_keys: false, rotate: true}"


def why_not(form: AttentionFormat, capability: int | None = None) -> str | None:
    """In one line why attention so rounded has no kernel, or None. capability: of the GPU, 90 for 9.0, or not known."""
    if form.number != FLOAT8 or not form.scales or form.smooth_keys or set(form.parts) != set(PARTS):
        return f"rounded attention has a kernel for quantize_attention: {_SETTINGS} alone, rotated or not"
    if capability is None:
        return None
    if capability < LEAST:
        return f"FP8 attention needs compute capability 9.0, which this GPU of {capability / 10} has not"
    try:
        importlib.import_module("cudnn")
    except ImportError as error:
        return f"FP8 attention needs cuDNN's frontend ({error}); {INSTALL}"
    return None


class FP8Attention:
    """A rounded attention as the operator finds it.

    Attributes:
        rotates: whether queries and keys are rotated before they are rounded.
        factors: float32 [6] on the device: 1/s of q, k, v, and their s.
    """

    def __init__(self, rounding: AttentionRounding, device: torch.device) -> None:
        self.site, self.rotates = rounding.site, rounding.form.turns
        self.form = replace(rounding.form, rotate=False)  # what the operator is given is rotated already
        scales = torch.tensor(rounding.form.scales, dtype=torch.float32, device=device)
        self.factors = torch.cat((scales.reciprocal(), scales))
        of_p = LARGEST_OF_P[FLOAT8]
        self.of_p = torch.tensor([1 / of_p, of_p], dtype=torch.float32, device=device)


_MARK = "ditq_fp8_attentions"


def take_off(model: nn.Module, device: torch.device) -> None:
    """Take rounded attentions off `model`, which then computes torch's own; `roundings_of` it tells them."""
    found = {part.site: part for part in model.modules() if isinstance(part, AttentionRounding)}
    for site in found:
        unanswer(model.get_submodule(site))
    setattr(model, _MARK, {site: FP8Attention(part, device) for site, part in found.items()})


def roundings_of(model: nn.Module) -> dict[str, FP8Attention]:
    """The attentions of FP8 numbers of a model on a GPU, by the module that they are in."""
    found: dict[str, FP8Attention] = getattr(model, _MARK, {})
    return found


def put(
    graph: fx.GraphModule,
    node: fx.Node,
    arguments: tuple[Any, Any, Any],
    place: int,
    scale: float | None,
    rotate: bool,
) -> fx.Node:
    """FP8 attention in the place of `node`, of these queries, keys and values, by the part at that place; its output.

    rotate: whether queries and keys are rotated before they are rounded.
    """
    ops = torch.ops.ditq
    with graph.graph.inserting_before(node):
        like = pieces_of(graph, arguments[2])[0]
        factors = graph.graph.call_function(ops.attention_factors.default, (like, place))
        eight = rounded(graph, arguments, factors, (rotate, rotate, False))
        result = graph.graph.call_function(ops.fp8_attention.default, (*eight, place, scale))
        wide = graph.graph.call_method("type_as", (result, like))
        of_values = graph.graph.call_method("select", (factors, 0, 5))
        y = graph.graph.call_function(torch.mul, (wide, of_values))
    node.replace_all_uses_with(y)
    graph.graph.erase_node(node)
    return y


_VIEWS = {
    "transpose",
    "permute",
    "flatten",
    "unflatten",
    "reshape",
    "view",
    "split",
    "split_with_sizes",
    "chunk",
    "narrow",
}
_SAME = {"to", "type_as", "contiguous"}


def read_as_fp8(graph: fx.GraphModule, made: Iterable[fx.Node]) -> None:
    """Let what rounds the outputs of FP8 attention for the next linear read them in FP8. made: what `put` has given."""
    outputs = set(made)
    for quantizer in graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.quantized.default):
        x, views = quantizer.args[0], []
        while isinstance(x, fx.Node) and x not in outputs and _is_view(x):
            views += [] if x.target in _SAME else [x]
            x = x.args[0]
        norm, keeps = quantizer.args[8], quantizer.args[21]
        if x not in outputs or norm or keeps:
            continue
        (result, _), times = x.args[0].args, x.args[1]
        with graph.graph.inserting_before(quantizer):
            for view in reversed(views):
                result = graph.graph.create_node(view.op, view.target, (result, *view.args[1:]), view.kwargs)
            tail = quantizer.args[22] if len(quantizer.args) > 22 else None
            quantizer.args = (result, *quantizer.args[1:22], tail, times)


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _VIEWS | _SAME
    return node.op == "call_function" and node.target in (operator.getitem, torch.flatten, torch.transpose, torch.split)


def _part(place: int) -> FP8Attention:
    part = asked()[place]
    assert isinstance(part, FP8Attention)
    return part


@custom_op("ditq::attention_factors", mutates_args=())
def attention_factors(value: Tensor, place: int) -> Tensor:
    """`factors` [6] of the part at that place among those that are `answering`; the values tell the device alone."""
    return _part(place).factors.clone()


@attention_factors.register_fake
def _(value: Tensor, place: int) -> Tensor:
    return value.new_empty((6,), dtype=torch.float32)


@custom_op("ditq::fp8_attention", mutates_args=())
def fp8_attention(query: Tensor, key: Tensor, value: Tensor, place: int, scale: float | None) -> Tensor:
    """query [B, h, N, d], key and value [B, h, M, d] in e4m3 -> [B, h, N, d] in e4m3, in memory [B, N, h, d]."""
    part = _part(place)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _by_cudnn(part, query, key, value, scale) if query.is_cuda else meaning(part, query, key, value, scale)


@fp8_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, place: int, scale: float | None) -> Tensor:
    return _empty(query)


def _empty(query: Tensor) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def meaning(part: FP8Attention, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same in plain torch, computed in float32."""
    q, k, v = (x.float() * s for x, s in zip((query, key, value), part.form.scales, strict=True))
    y = rounded_attention(q, k, v, None, scale, part.form) / part.form.scales[2]
    return y.transpose(1, 2).contiguous().transpose(1, 2).to(E4M3)


def _by_cudnn(part: FP8Attention, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    cudnn = importlib.import_module("cudnn")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    y = _empty(query)
    layouts = tuple((tuple(x.shape), tuple(x.stride())) for x in (query, key, value, y))
    handle = _handle(query.get_device())
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(query.device).cuda_stream)
    try:
        graph = _graph(handle, layouts, scale)
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        shape, said = f"{tuple(query.shape)} by {tuple(key.shape)}", str(error).splitlines() or ["no reason given"]
        raise DitqError(
            f"{part.site}: cuDNN {cudnn.backend_version()} has no FP8 attention of {shape}: {said[0]}; "
            "leave quantize_attention out"
        ) from error
    factors, of_p = part.factors, part.of_p
    given = (query, key, value, y, factors[3:4], factors[4:5], factors[5:6], of_p[:1], of_p[1:], factors[2:3])
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=query.device)
    graph.execute(dict(zip(_UIDS, given, strict=True)), workspace, handle=handle)
    return y


_UIDS = range(1, 11)  # of query, key, value, output, s_q, s_k, s_v, s_p, 1 / s_p, 1 / s_v


@cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return importlib.import_module("cudnn").create_handle()


@lru_cache(maxsize=256)
def _graph(handle: Any, layouts: Sequence[Any], scale: float) -> Any:
    """cuDNN's graph for tensors of these shapes and strides."""
    cudnn = importlib.import_module("cudnn")
    eight, wide = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=eight, intermediate_data_type=wide, compute_data_type=wide, handle=handle)
    uids = iter(_UIDS)

    def tensor(layout: Any) -> Any:
        return graph.tensor(uid=next(uids), dim=layout[0], stride=layout[1], data_type=eight)

    def number() -> Any:
        return graph.tensor(uid=next(uids), dim=(1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=wide)

    q, k, v = (tensor(layout) for layout in layouts[:3])
    of_output = next(uids)
    s_q, s_k, s_v, s_p, steps_of_p, steps_of_y = (number() for _ in range(6))
    y, _, *largest = graph.sdpa_fp8(
        q=q, k=k, v=v, descale_q=s_q, descale_k=s_k, descale_v=s_v, descale_s=s_p, scale_s=steps_of_p, scale_o=steps_of_y,
        generate_stats=False, attn_scale=scale, use_causal_mask=False,
    )  # fmt: skip
    y.set_uid(of_output).set_output(True).set_dim(layouts[3][0]).set_stride(layouts[3][1]).set_data_type(eight)
    for found in largest:
        found.set_output(False).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1)).set_data_type(wide)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph
