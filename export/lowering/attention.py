"""ONNX Attention in the forms that ONNX Runtime's CPU provider runs well.

Rules, for plain attention (all of [batch, heads, tokens, head_dim]; no cache, not causal, not grouped):
  1. Without a mask: com.microsoft.MultiHeadAttention, up to 1.4x as fast as Attention.
  2. With a mask: MatMul, Add, Softmax, MatMul. Both kernels refuse a mask that broadcasts over the queries, as text
     masks do.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.writer import MICROSOFT, Writer

_PLAIN = {"scale", "is_causal", "softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads", "softmax_precision"}


def lower_attention(model: ir.Model) -> None:
    """Rewrite every plain Attention of the graph, in place."""
    writer = Writer(model)
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain == "" and is_plain(node):
            writer.move(node, node.name or "attention")
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            put_in_place(writer, node, _multi_head(writer, node) if mask is None else decomposed(writer, node))


def put_in_place(writer: Writer, node: ir.Node, y: ir.Value) -> None:
    """Take the attention out of the graph in favour of y, which takes its name."""
    result = node.outputs[0]
    y.shape, y.type = result.shape, result.type
    result.replace_all_uses_with(y, replace_graph_outputs=True)
    writer.graph.remove(node, safe=True)
    y.name, result.name = result.name, None


def is_plain(node: ir.Node) -> bool:
    """Whether it is one of rules 1 and 2, with heads of a known number and width."""
    if any(value is not None for value in node.inputs[4:]) or any(output.uses() for output in node.outputs[1:]):
        return False
    for name in ("is_causal", "softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads"):
        if name in node.attributes and node.attributes[name].value:
            return False
    if set(node.attributes) - _PLAIN:
        return False
    sizes = {heads_and_width(value) for value in node.inputs[:3]}
    return len(sizes) == 1 and None not in sizes


def heads_and_width(value: ir.Value | None) -> tuple[int, int] | None:
    """(heads, head_dim) of a value [batch, heads, tokens, head_dim] where they are known."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    heads, width = value.shape[1], value.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def _multi_head(writer: Writer, node: ir.Node) -> ir.Value:
    sizes = heads_and_width(node.inputs[0])
    assert sizes is not None
    heads, width = sizes
    joined = writer.constant([0, 0, heads * width], np.int64, name="shape")
    parted = writer.constant([0, 0, heads, width], np.int64, name="shape")
    tokens_first = []
    for value in node.inputs[:3]:
        assert value is not None
        turned = writer.op("Transpose", value, name="tokens_first", perm=[0, 2, 1, 3])
        tokens_first.append(writer.op("Reshape", turned, joined, name="heads_joined"))
    settings = {"num_heads": heads, "scale": _scale(node)}
    y = writer.op("MultiHeadAttention", *tokens_first, name="attention", domain=MICROSOFT, **settings)
    y = writer.op("Reshape", y, parted, name="heads_parted")
    return writer.op("Transpose", y, name="heads_first", perm=[0, 2, 1, 3])


def decomposed(writer: Writer, node: ir.Node) -> ir.Value:
    """The attention as MatMul, Softmax, MatMul."""
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    keys_last = writer.op("Transpose", key, name="keys_last", perm=[0, 1, 3, 2])
    scaled = writer.op("Mul", query, writer.constant(_scale(node), np.float32, name="scale"), name="scaled")
    scores = writer.op("MatMul", scaled, keys_last, name="scores")
    scores = scores if mask is None else with_mask(writer, scores, mask)
    return writer.op("MatMul", writer.op("Softmax", scores, name="weights", axis=-1), value, name="attention")


def with_mask(writer: Writer, scores: ir.Value, mask: ir.Value) -> ir.Value:
    """Scores [batch, heads, queries, tokens] with a mask that is true where a key is seen, or is to be added."""
    if mask.dtype == ir.DataType.BOOL:
        lowest = writer.constant(np.finfo(np.float32).min, np.float32, name="lowest")
        return writer.op("Where", mask, scores, lowest, name="masked")
    return writer.op("Add", scores, mask, name="masked")


def _scale(node: ir.Node) -> float:
    """Of q k^T; 1/sqrt(head_dim) unless the node says otherwise."""
    if "scale" in node.attributes:
        return node.attributes["scale"].as_float()
    sizes = heads_and_width(node.inputs[0])
    assert sizes is not None
    return float(sizes[1] ** -0.5)
