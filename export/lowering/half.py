"""Matrix products in half precision, everything between them in float32: what a GPU's tensor cores multiply.

Rules:
  1. MatMul and Conv of floats read float16 and write float16, and so do ONNX Runtime's own MatMulNBits and
     MultiHeadAttention; a Cast on each side joins them to the float32 around, which TensorRT computes in the kernels that
     stand there anyway. Residual sums so never leave the range of float16. A linear of single rows (Gemm) is a MatMul, with
     its bias behind it in float32.
  2. What ends in a Sin or Cos stays in float32: a timestep of 1000 or a position times a frequency needs all its digits.
  3. So do the scores that a TopK compares: half a digit less sends a token to another expert.
  4. Attention is a product of rule 1, as one node where TensorRT has a kernel for the width of its heads. With a mask, or of
     another width, it is MatMul, Softmax in float32, MatMul, which TensorRT for RTX makes the same kernel of.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ditq.export.lowering.attention import decomposed, heads_and_width, is_plain, put_in_place
from ditq.export.lowering.writer import MICROSOFT, Writer

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
_PRODUCTS = {("", name) for name in ("MatMul", "Gemm", "Conv", "Attention")}
_PRODUCTS |= {(MICROSOFT, "MatMulNBits"), (MICROSOFT, "MultiHeadAttention")}


def multiply_in_half(writer: Writer, low_bit: Collection[ir.Value] = ()) -> None:
    """Apply the rules to the graph, in place. low_bit: what products make that have their form already."""
    for node in list(writer.graph):
        if node.op_type == "Attention" and node.domain == "" and is_plain(node) and not has_kernel(node):
            writer.move(node, node.name or "attention")
            put_in_place(writer, node, decomposed(writer, node))
        elif node.op_type == "Gemm" and node.domain == "" and _is_linear(node):
            writer.move(node, node.name or "linear")
            put_in_place(writer, node, _with_bias_behind(writer, node))
    casts: dict[ir.Value, ir.Value] = {}
    exact = _behind_sines(writer.graph) | _scores(writer.graph)
    for node in list(writer.graph):
        if _is_product(node) and node not in exact and node.outputs[0] not in low_bit:
            _in_half(writer, node, casts)


def _is_product(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in _PRODUCTS


def _is_linear(node: ir.Node) -> bool:
    """Whether a Gemm is x W^T + b."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return given.get("transB") == 1 and not given.get("transA") and {given.get("alpha", 1), given.get("beta", 1)} == {1}


def _with_bias_behind(writer: Writer, node: ir.Node) -> ir.Value:
    x, weight, bias = (*node.inputs, None)[:3]
    turned = writer.op("Transpose", weight, name="weight.transposed", perm=[1, 0])
    y = writer.op("MatMul", x, turned, name="matmul")
    return y if bias is None else writer.op("Add", y, bias, name="biased")


def has_kernel(node: ir.Node) -> bool:
    """Whether a plain attention is left as one node: heads of a width that TensorRT has a kernel for (docs/tensorrt.md)."""
    sizes = heads_and_width(node.inputs[0])
    masked = len(node.inputs) > 3 and node.inputs[3] is not None
    return sizes is not None and not masked and sizes[1] % 8 == 0 and 16 <= sizes[1] <= 256


def _behind_sines(graph: ir.Graph) -> set[ir.Node]:
    """Every node that a Sin or Cos is computed from."""
    left = [node for node in graph if node.op_type in ("Sin", "Cos")]
    seen: set[ir.Node] = set()
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
    return seen


def _scores(graph: ir.Graph) -> set[ir.Node]:
    """The products whose results a TopK compares, with no other product between."""
    left = [node for node in graph if node.op_type == "TopK"]
    found: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    while left:
        for value in left.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is None or maker in seen:
                continue
            seen.add(maker)
            if _is_product(maker):
                found.add(maker)
            else:
                left.append(maker)
    return found


def _in_half(writer: Writer, node: ir.Node, casts: dict[ir.Value, ir.Value]) -> None:
    """Give the node its inputs in half precision, and others its output back in float32."""
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in (None, FLOAT):
            node.replace_input_with(index, _cast(writer, value, casts))
    y = node.outputs[0]
    back = ir.node("Cast", [y], {"to": FLOAT}, name=f"{y.name}/float")
    z = back.outputs[0]
    z.name, z.shape, z.type = f"{y.name}/float", y.shape, ir.TensorType(FLOAT)
    writer.graph.insert_after(node, back)
    y.type = ir.TensorType(HALF)
    y.replace_all_uses_with(z, replace_graph_outputs=True)
    back.replace_input_with(0, y)
    if z.is_graph_output():
        y.name, z.name = z.name, y.name


def _cast(writer: Writer, value: ir.Value, casts: dict[ir.Value, ir.Value]) -> ir.Value:
    """The value in half precision: one Cast for all its readers, right where it is made."""
    if value not in casts:
        maker = value.producer()
        cast = ir.node("Cast", [value], {"to": HALF}, name=f"{value.name}/half")
        half = cast.outputs[0]
        half.name, half.shape, half.type = f"{value.name}/half", value.shape, ir.TensorType(HALF)
        if maker is None:
            writer.graph.insert_before(next(iter(writer.graph)), cast)
        else:
            writer.graph.insert_after(maker, cast)
        casts[value] = half
    return casts[value]
