"""A transformer -> an ONNX graph in which every QuantLinear is one node `ditq::QuantLinear`, to be lowered by a target, and
every attention with rounded parts one node `ditq::RoundedAttention`, every other token attention one `ditq::TokenAttention`.

The graph comes from torch.export with named dynamic dimensions; parameters that stay in float are its initializers,
under the names that they have in the model's state dict.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from onnx_ir.passes import common as cleanups
from onnxscript import optimizer
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export.arguments import Layout, flatten, unflatten
from ditq.export.complex_numbers import has_complex, without_complex
from ditq.export.kept_sizes import keeping_sizes
from ditq.nn import exporting
from ditq.quiet import quiet_libraries

OPSET = 23  # the first with Attention and RMSNormalization
DOMAIN = "ditq"
ROUNDED_ATTENTION = "RoundedAttention"
TOKEN_ATTENTION = "TokenAttention"
MOST_TENSORS = 6  # of one
OUTPUT = "sample"
_PREFIX = "model."
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

_CLEANUPS = (
    cleanups.RemoveUnusedNodesPass(),
    cleanups.RemoveUnusedFunctionsPass(),
    cleanups.RemoveUnusedOpsetsPass(),
    cleanups.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    cleanups.DeduplicateInitializersPass(),
    cleanups.CommonSubexpressionEliminationPass(),
    cleanups.IdentityEliminationPass(),
    cleanups.OutputFixPass(),
    cleanups.NameFixPass(),
)

Axes = Mapping[str, tuple[str | None, ...]]

_quant_linear_schema = OpSchema(
    "QuantLinear",
    DOMAIN,
    1,
    inputs=[OpSchema.FormalParameter("x", "T")],
    outputs=[OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", _FLOATS, "")],
    attributes=[
        OpSchema.Attribute("site", OpSchema.AttrType.STRING),
        OpSchema.Attribute("out_features", OpSchema.AttrType.INT),
    ],
)
_rounded_attention_schema = OpSchema(
    ROUNDED_ATTENTION,
    DOMAIN,
    1,
    inputs=[
        *(OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")),
        OpSchema.FormalParameter("mask", "M", param_option=OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", _FLOATS, ""), ("M", [*_FLOATS, "tensor(bool)"], "")],
    attributes=[
        OpSchema.Attribute("site", OpSchema.AttrType.STRING),
        OpSchema.Attribute("number", OpSchema.AttrType.STRING),
        OpSchema.Attribute("parts", OpSchema.AttrType.STRING),
        OpSchema.Attribute("smooth_keys", OpSchema.AttrType.INT),
        OpSchema.Attribute("scales", OpSchema.AttrType.FLOATS, required=False),
        OpSchema.Attribute("rotate", OpSchema.AttrType.INT),
        OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT),
    ],
)
_token_attention_schema = OpSchema(
    TOKEN_ATTENTION,
    DOMAIN,
    1,
    inputs=[
        *(OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")),
        *(OpSchema.FormalParameter(name, "tensor(int64)") for name in ("text", "height", "width", "frames")),
        *(  # of tokens in another order: which lies at each place, and where each lies
            OpSchema.FormalParameter(name, "tensor(int64)", param_option=OpSchema.FormalParameterOption.Optional)
            for name in ("listed", "places")
        ),
        *(  # the exporter repeats the others among inputs of any number
            OpSchema.FormalParameter(f"tensor{i}", f"T{i}", param_option=OpSchema.FormalParameterOption.Optional)
            for i in range(MOST_TENSORS)
        ),
    ],
    outputs=[OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", _FLOATS, ""), *((f"T{i}", [*_FLOATS, "tensor(int32)"], "") for i in range(MOST_TENSORS))],
    attributes=[
        OpSchema.Attribute("site", OpSchema.AttrType.STRING),
        OpSchema.Attribute("kind", OpSchema.AttrType.STRING),
        OpSchema.Attribute("settings", OpSchema.AttrType.STRING),
        OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT),
    ],
)
_quant_linear_op = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), "QuantLinear", _quant_linear_schema)


_rounded_attention_op = onnxscript.values.Op(
    onnxscript.values.Opset(DOMAIN, 1), ROUNDED_ATTENTION, _rounded_attention_schema
)
_token_attention_op = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), TOKEN_ATTENTION, _token_attention_schema)


def _quant_linear(x: Any, site: str, out_features: int) -> Any:
    return _quant_linear_op(x, site=site, out_features=out_features)


def _rounded_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    site: str,
    number: str,
    parts: str,
    smooth_keys: bool,
    scales: Sequence[float],
    rotate: bool,
    scale: float,
) -> Any:
    settings = {"site": site, "number": number, "parts": parts, "smooth_keys": int(smooth_keys), "rotate": int(rotate)}
    settings["scale"] = scale
    static = {"scales": tuple(scales)} if scales else {}  # an attribute cannot be an empty list
    return _rounded_attention_op(query, key, value, mask, **settings, **static)


def _token_attention(
    query: Any, key: Any, value: Any, grid: Any, tensors: Any, site: str, kind: str, settings: str, scale: float
) -> Any:
    attributes = {"site": site, "kind": kind, "settings": settings, "scale": scale}
    sides, moved = grid[:4], grid[4:] or (None, None)
    return _token_attention_op(query, key, value, *sides, *moved, *tensors, **attributes)


class _Flat(nn.Module):
    """The model as a function of one flat dictionary of tensors."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        answer = self.model(**unflatten(tensors, self.layout), return_dict=False)[0]
        if not isinstance(answer, Tensor):
            raise TypeError(f"its answer is a {type(answer).__name__}, not one tensor")
        return answer


def to_onnx(model: nn.Module, inputs: Mapping[str, Any], axes: Axes) -> ir.Model:
    """Export `model` called with the keyword arguments `inputs`.

    Args:
        model: called as model(**inputs, return_dict=False)[0]; in eval mode, float32.
        inputs: example arguments; may nest dictionaries and hold None. Varying dimensions should be 2 or more, and of
            different sizes where they are different axes.
        axes: flat input name -> a name a dimension; None is a fixed dimension. The same name is the same size.

    Returns:
        The graph, with input names as in `export/arguments.py` and the one output `sample`.

    Raises:
        DitqError: the model cannot be exported, or an axis cannot vary (named).
    """
    graph, dropped = export_what_varies(model, inputs, axes)
    if dropped:
        places = "; ".join(f"'{a}' of {', '.join(n for n, row in axes.items() if a in row)}" for a in dropped)
        raise DitqError(f"axes: {places} cannot vary in an export of this model; leave it out of the axes")
    return graph


def export_what_varies(model: nn.Module, inputs: Mapping[str, Any], axes: Axes) -> tuple[ir.Model, list[str]]:
    """`to_onnx`, but an axis that cannot vary is fixed to the size of the example: (graph, names of those axes).

    Raises:
        DitqError: the model cannot be exported.
    """
    tensors, layout = flatten(inputs)
    for name, tensor in tensors.items():
        if len(axes.get(name, ())) > tensor.dim():
            raise DitqError(f"axes: {name} has {tensor.dim()} dimensions but {len(axes[name])} names")
    wrapper = _Flat(model, layout).eval()
    # AUTO lets tracing find out what can vary; what it turned into a constant is read off the traced inputs.
    varying = {
        name: {i: torch.export.Dim.AUTO for i, axis in enumerate(axes.get(name, ())) if axis} for name in tensors
    }
    with (
        torch.no_grad(),
        exporting(model),
        keeping_sizes(model),
        warnings.catch_warnings(),
        quiet_libraries(),
        _quiet_exporter(),
    ):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(wrapper, (tensors,), dynamic_shapes={"tensors": varying}, strict=False)
            dropped = _fixed_axes(program, tensors, axes)
            if has_complex(program):
                for name, row in axes.items():
                    varying[name] = {i: dim for i, dim in varying[name].items() if row[i] not in dropped}
                program = without_complex(program, (tensors,), {"tensors": varying})
        except (RuntimeError, ValueError, TypeError, torch._dynamo.exc.TorchDynamoException) as error:
            raise DitqError(f"the model cannot be exported: {_first_line(error)}") from error
        graph = _translate(program, list(tensors))
    _name_dimensions(graph, tensors, axes, dropped)
    return graph, dropped


def _fixed_axes(program: Any, tensors: Mapping[str, Tensor], axes: Axes) -> list[str]:
    """The axes that tracing made constant, or equal to an axis of another name."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"][-len(tensors) :]
    fixed: dict[str, None] = {}
    owners: dict[str, str] = {}
    for name, node in zip(tensors, placeholders, strict=True):
        for size, axis in zip(node.meta["val"].shape, axes.get(name, ()), strict=False):
            # A number that the forward was asked for is a symbol yet, of a value that is known: 12, not s1.
            known = not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols
            if axis and (known or owners.setdefault(str(size), axis) != axis):
                fixed[axis] = None
    return list(fixed)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter notes on every run that torchvision is absent, which ditq does without. What it cannot trace it prints, as
    far as it came: pages, of which the error says the last line."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _translate(program: Any, names: list[str]) -> ir.Model:
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={
                torch.ops.ditq.quant_linear.default: _quant_linear,
                torch.ops.ditq.rounded_attention.default: _rounded_attention,
                torch.ops.ditq.token_attention.default: _token_attention,
            },
        )
    except torch.onnx.OnnxExporterError as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # what it says itself is how to report it
            reason = reason.__cause__
        raise DitqError(f"the model cannot be written as ONNX: {_first_line(reason)}") from error
    assert exported is not None
    graph = exported.model
    _drop_idle_squeezes(graph)
    _choose_by_logic(graph)
    # Rewrite rules are left out: they take a third of the export, and the runtimes have their own.
    cleanups.InlinePass()(graph)
    optimizer.fold_constants_ir(graph, onnx_shape_inference=True, should_fold=_may_fold)
    _fold_exponentials(graph)
    optimizer.fold_constants_ir(graph, should_fold=_may_fold)
    for cleanup in _CLEANUPS:
        cleanup(graph)
    for node in graph.graph:
        _name_after_module(node)
    cleanups.ClearMetadataAndDocStringPass()(graph)
    for value, name in zip(graph.graph.inputs, names, strict=True):
        value.name = name
    graph.graph.outputs[0].name = OUTPUT
    for name, value in list(graph.graph.initializers.items()):
        value.name = name.removeprefix(_PREFIX)
    graph.opset_imports[DOMAIN] = 1
    return graph


def _name_after_module(node: ir.Node) -> None:
    """Put the module that a node was traced in in front of its name, for whoever has to say where a node comes from."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    module = scopes[-2].removeprefix("model").removeprefix(".") if len(scopes) > 1 else ""
    if module:
        node.name = f"{module}/{node.name}"


def _drop_idle_squeezes(graph: ir.Model) -> None:
    """Remove each Squeeze of a dimension that is not 1: torch leaves such a tensor alone, ONNX refuses it."""
    for node in list(graph.graph):
        if node.op_type != "Squeeze" or len(node.inputs) < 2:
            continue
        x, axes = node.inputs[0], node.inputs[1]
        constant = None if axes is None else ir.convenience.get_const_tensor(axes)
        if x is None or x.shape is None or constant is None:
            continue
        if all(x.shape[int(axis)] != 1 for axis in constant.numpy().reshape(-1)):
            node.outputs[0].replace_all_uses_with(x, replace_graph_outputs=True)
            graph.graph.remove(node, safe=True)


def _choose_by_logic(graph: ir.Model) -> None:
    """Where(c, a, b) of truth values -> (c and a) or (not c and b): ONNX Runtime chooses between numbers only."""
    for node in list(graph.graph):
        if node.op_type != "Where" or node.outputs[0].dtype != ir.DataType.BOOL:
            continue
        condition, one, other = node.inputs
        left, no = ir.node("And", [condition, one]), ir.node("Not", [condition])
        right = ir.node("And", [no.outputs[0], other])
        either = ir.node("Or", [left.outputs[0], right.outputs[0]])
        for made in (left, no, right, either):
            made.outputs[0].dtype = ir.DataType.BOOL
            made.metadata_props.update(node.metadata_props)
            graph.graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(either.outputs[0], replace_graph_outputs=True)
        graph.graph.remove(node, safe=True)


def _may_fold(node: ir.Node) -> bool | None:
    """Not what touches parameters, which keep the names and layout of the state dict: the runtime folds that."""
    parameters = [v for v in node.inputs if v is not None and v.is_initializer() and (v.name or "").startswith(_PREFIX)]
    return False if parameters or node.op_type == "Exp" else None


def _fold_exponentials(graph: ir.Model) -> None:
    """Evaluate exponentials of constants as torch does, to the last bit.

    They are the frequencies of sinusoidal embeddings, which a timestep of up to 1000 multiplies: one unit in the last
    place here would move every layer's input by 1e-5 and flip roundings of activations all over the model.
    """
    for node in list(graph.graph):
        value = node.inputs[0] if node.op_type == "Exp" else None
        constant = None if value is None else ir.convenience.get_const_tensor(value)
        if constant is None:
            continue
        result = torch.exp(torch.from_numpy(constant.numpy().copy()))
        folded = ir.Value(name=node.outputs[0].name, const_value=ir.tensor(result.numpy()))
        folded.shape, folded.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].name = None
        node.outputs[0].replace_all_uses_with(folded)
        graph.graph.remove(node, safe=True)
        graph.graph.register_initializer(folded)


def _name_dimensions(graph: ir.Model, tensors: Mapping[str, Tensor], axes: Axes, fixed: list[str]) -> None:
    for value in graph.graph.inputs:
        assert value.name is not None
        sizes = tensors[value.name].shape
        row = (*axes.get(value.name, ()), *(None,) * len(sizes))
        value.shape = ir.Shape([axis if axis and axis not in fixed else size for axis, size in zip(row, sizes)])  # noqa: B905


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
