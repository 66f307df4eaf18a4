"""Complex numbers out of an exported program: ONNX has none.

Transformers that turn queries and keys by complex numbers (Qwen-Image, Lumina) compute those from sizes alone, which an
exported graph holds as constants, and multiply: view_as_real(view_as_complex(x) * turn). Written in pairs of reals that is
(a + bi)(c + di) = (ac - bd) + (ad + bc)i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


def has_complex(program: torch.export.ExportedProgram) -> bool:
    """Whether any value of it is complex."""
    return any(_is_complex(node) for node in program.graph.nodes)


def without_complex(
    program: torch.export.ExportedProgram, arguments: tuple[Any, ...], dynamic_shapes: dict[str, Any]
) -> torch.export.ExportedProgram:
    """The same program with pairs of reals for complex numbers.

    Raises:
        ValueError: it does with complex numbers what is not known here, which would mean something else with pairs.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    known, made = dict[Node, Any](), dict[str, Node]()
    for node in _worth_knowing(module):
        _put_constant(module, node, known, made)
    for node in list(module.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default and any(map(_is_complex, node.all_input_nodes)):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    pairs = set(made.values())
    for node in module.graph.nodes:
        _check_known(node, pairs)
    for node in list(module.graph.nodes):
        _in_pairs(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes, strict=False)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _worth_knowing(module: GraphModule) -> list[Node]:
    """Complex values that follow from constants alone and are read by what does not."""
    constant: set[Node] = set()
    for node in module.graph.nodes:
        made_of = all(before in constant for before in node.all_input_nodes)
        if node.op == "get_attr" or (node.op == "call_function" and made_of):
            constant.add(node)
    return [
        node for node in module.graph.nodes
        if node in constant and _is_complex(node) and any(reader not in constant for reader in node.users)
    ]  # fmt: skip


def _put_constant(module: GraphModule, node: Node, known: dict[Node, Any], made: dict[str, Node]) -> None:
    """Evaluate the node and put its value, a pair of reals in the last dimension, in its place.

    known: values of nodes that were evaluated already; made: what stands for the same call elsewhere, as in other blocks.
    """

    def value_of(wanted: Node) -> Any:
        if wanted not in known:
            if wanted.op == "get_attr":
                found: Any = module
                for name in str(wanted.target).split("."):
                    found = getattr(found, name)
                known[wanted] = found
            else:
                given = tree_map_only(Node, value_of, (wanted.args, dict(wanted.kwargs)))
                assert callable(wanted.target)
                known[wanted] = wanted.target(*given[0], **given[1])
        return known[wanted]

    call, name = f"{node.target} {node.args} {node.kwargs}", f"constant_{node.name}"
    if call not in made:
        module.register_buffer(name, torch.view_as_real(value_of(node).resolve_conj()).clone())
        with module.graph.inserting_before(node):
            made[call] = module.graph.get_attr(name)
    node.replace_all_uses_with(made[call])


_BETWEEN_COMPLEX = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)


def _check_known(node: Node, pairs: set[Node]) -> None:
    """That a step with complex numbers computes the same with pairs; `pairs` are constants that are some already."""
    complex_ones = [given for given in node.all_input_nodes if _is_complex(given) or given in pairs]
    begins = node.op == "get_attr" or node.target is aten.view_as_complex.default
    if begins or not (complex_ones or _is_complex(node)):
        return
    known = node.target is aten.view_as_real.default or (
        node.target in _BETWEEN_COMPLEX and not node.kwargs and all(side in complex_ones for side in node.args)
    )
    known = known or (node.target is aten.unsqueeze.default and isinstance(node.args[1], int) and node.args[1] >= 0)
    if not known:
        raise ValueError(
            f"complex numbers go through {node.target}; known are view_as_complex, view_as_real, and products, sums and "
            "differences of two complex tensors"
        )


def _in_pairs(module: GraphModule, node: Node) -> None:
    """Replace a step from reals to complex numbers or back, or a product of them."""
    if node.target in (aten.view_as_complex.default, aten.view_as_real.default):
        pair = node.args[0]
        assert isinstance(pair, Node)
        node.replace_all_uses_with(pair)
    elif node.target is aten.mul.Tensor and _is_complex(node):
        left, right = node.args
        assert isinstance(left, Node) and isinstance(right, Node)
        with module.graph.inserting_before(node):
            a, b, c, d = (
                module.graph.call_function(aten.select.int, (side, -1, place))
                for side in (left, right)
                for place in (0, 1)
            )

            def product(first: Node, second: Node) -> Node:
                return module.graph.call_function(aten.mul.Tensor, (first, second))

            real = module.graph.call_function(aten.sub.Tensor, (product(a, c), product(b, d)))
            imaginary = module.graph.call_function(aten.add.Tensor, (product(a, d), product(b, c)))
            pair = module.graph.call_function(aten.stack.default, ([real, imaginary], -1))
        node.replace_all_uses_with(pair)
