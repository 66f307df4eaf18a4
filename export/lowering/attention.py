"""ONNX Attention -> com.microsoft.MultiHeadAttention, the faster kernel of ONNX Runtime's CPU provider.

Rules:
  1. Only plain attention (queries, keys and values [batch, heads, tokens, head_dim]; no cache, no causal or grouped form).
  2. A mask stays with Attention: MultiHeadAttention wants it expanded over all queries, which costs more than it gains.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.writer import MICROSOFT, Writer

_PLAIN = {"scale", "is_causal", "softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads", "softmax_precision"}


def use_multi_head_attention(model: ir.Model) -> int:
    """Rewrite every plain Attention of the graph, in place; how many were rewritten."""
    writer, count = Writer(model), 0
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain == "" and _is_plain(node):
            writer.move(node, node.name or "attention")
            _rewrite(writer, node)
            count += 1
    return count


def _is_plain(node: ir.Node) -> bool:
    if any(value is not None for value in node.inputs[3:]) or len(node.outputs) > 1 and any(
        output.uses() for output in node.outputs[1:]
    ):
        return False
    for name in ("is_causal", "softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads"):
        if name in node.attributes and node.attributes[name].value:
            return False
    if set(node.attributes) - _PLAIN:
        return False
    shapes = [value.shape for value in node.inputs[:3] if value is not None]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return False
    heads, widths = {shape[1] for shape in shapes if shape}, {shape[3] for shape in shapes if shape}
    return len(heads) == 1 and len(widths) == 1 and isinstance(*heads, int) and isinstance(*widths, int)


def _rewrite(writer: Writer, node: ir.Node) -> None:
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    heads, width = int(query.shape[1]), int(query.shape[3])
    joined = writer.constant([0, 0, heads * width], np.int64, name="shape")
    parted = writer.constant([0, 0, heads, width], np.int64, name="shape")
    tokens_first = []
    for value in node.inputs[:3]:
        assert value is not None
        turned = writer.op("Transpose", value, name="tokens_first", perm=[0, 2, 1, 3])
        tokens_first.append(writer.op("Reshape", turned, joined, name="heads_joined"))
    settings = {"num_heads": heads}
    if "scale" in node.attributes:
        settings["scale"] = node.attributes["scale"].as_float()
    y = writer.op("MultiHeadAttention", *tokens_first, name="attention", domain=MICROSOFT, **settings)
    y = writer.op("Reshape", y, parted, name="heads_parted")
    y = writer.op("Transpose", y, name="heads_first", perm=[0, 2, 1, 3])
    node.outputs[0].replace_all_uses_with(y)
    writer.graph.remove(node, safe=True)
