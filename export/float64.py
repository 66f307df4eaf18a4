"""What an engine's graphs mean, in float64: plain arithmetic in place of a runtime's kernels, every float twice as long.

In float32 the last bit of a value decides now and then which integer it is rounded to, and each layer multiplies such flips
(agreement.py). Values of float64 differ by 1e-16, so that practically none of them falls to the other side of a tie: the graph
and the torch meaning are equal to about 1e-15 as they are, or they do not mean the same. What the runtime makes of the graph is
no part of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ditq.errors import DitqError
from ditq.export.agreement import relative_difference, running_output
from ditq.export.engine import TEXT_GRAPH, Engine
from ditq.export.loader import call_of, engine_inputs
from ditq.export.lowering.writer import MICROSOFT
from ditq.export.targets.torch import rebuild
from ditq.memory import free_memory
from ditq.nn import InputTransform, QuantLinear
from ditq.nn.answered_attention import AnswersAttention
from ditq.nn.call_timestep import ARGUMENT
from ditq.numerics.rotation import BlockStep, Rotation

BYTES_A_PARAMETER = 16  # float64 of torch's weights, and of the graph's as they are decoded
TOLERANCE = 1e-6  # seen are 1e-16 to 1e-8, where constants that a graph holds in float32 differ
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
Array = NDArray[Any]


@dataclass(frozen=True)
class Float64Agreement:
    """The outputs of an engine and of its torch meaning on the same inputs, against the meaning in float64: ||a - b|| / ||b||.

    Attributes:
        meaning: of the engine's graphs, in float64 too.
        engine: of what runs, with the kernels and in the precision that its target has.
        torch: of torch in float32.
    """

    meaning: float
    engine: float
    torch: float

    @property
    def holds(self) -> bool:
        """The graphs mean what torch does."""
        return self.meaning < TOLERANCE

    def __str__(self) -> str:
        return (
            f"in float64 the graph's output is within {self.meaning:.0e} of torch's; "
            f"what runs is {self.engine:.0e} from that, torch in float32 {self.torch:.0e}"
        )


@torch.no_grad()
def float64_agreement(engine: Engine, inputs: Mapping[str, Any]) -> Float64Agreement:
    """Compute the whole model in float64, by the engine's graphs and by torch, and compare, roundings and all.

    Args:
        inputs: keyword arguments of the transformer, such as those of a recorded call.

    Raises:
        DitqError: too little memory for the weights in float64, 16 bytes a parameter; or the engine has no graph.
    """
    arguments = call_of(engine, inputs)
    if not engine.graphs:
        raise DitqError(f"{engine.folder}: an engine for target {engine.manifest['target']} has no graph to compare")
    model = rebuild(engine)
    _check_memory(engine, model)
    plain = model(**arguments, return_dict=False)[0]
    expected = in_float64(model, arguments)
    del model
    return Float64Agreement(
        relative_difference(torch.from_numpy(_graphs_in_float64(engine, arguments)), expected),
        relative_difference(running_output(engine, arguments), expected),
        relative_difference(plain, expected),
    )


def in_float64(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The output of a transformer whose floats, its own and those of its arguments, are made float64."""
    model._apply(lambda tensor: tensor.double() if tensor.dtype == torch.float32 else tensor)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.forget()  # weights that were decoded before
        if isinstance(layer, InputTransform):
            layer.rotations = [(start, stop, _as_exported(rotation)) for start, stop, rotation in layer.rotations]
        if isinstance(layer, nn.RMSNorm) and layer.eps is None:
            layer.eps = torch.finfo(torch.float32).eps
        if isinstance(layer, AnswersAttention):
            layer.register_forward_pre_hook(lambda _, given: (*given[:4], _exported_scale(*given[:1], *given[4:])))
    with _Float64(), _ExportedScale():
        output: Tensor = model(**{name: _wide(value) for name, value in arguments.items()}, return_dict=False)[0]
    return output


def _as_exported(rotation: Rotation) -> Rotation:
    """The rotation with its factors as a graph holds them: those of float32."""
    steps = (replace(s, matrix=s.matrix.float().double()) if isinstance(s, BlockStep) else s for s in rotation.steps)
    return replace(rotation, steps=tuple(steps))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_wide(item) for item in value)
    return {name: _wide(item) for name, item in value.items()} if isinstance(value, dict) else value


class _Float64(TorchDispatchMode):
    """What the model casts to float32 becomes float64. Constants that it makes for itself stay what an export writes down; a
    cast of them is none, so that a product may meet one of them beside a float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.ops.aten._to_copy.default and given.get("dtype") is torch.float32:
            given = {**given, "dtype": torch.float64}
        if func in _OF_ONE_DTYPE and any(_dtype_of(each) is torch.float64 for each in args):
            args = tuple(each.double() if _dtype_of(each) is torch.float32 else each for each in args)
        return func(*args, **given)


_PRODUCTS = ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "convolution")
_OF_ONE_DTYPE = tuple(getattr(torch.ops.aten, name).default for name in _PRODUCTS)


def _dtype_of(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None


class _ExportedScale(TorchFunctionMode):
    """Attention with the scale that a graph holds: that of float32, which few square roots are in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else given["query"]
            given = {**given, "scale": _exported_scale(query, given.get("scale"))}
        return func(*args, **given)


def _exported_scale(query: Tensor, scale: float | None) -> float:
    return float(np.float32(query.shape[-1] ** -0.5 if scale is None else scale))


def _check_memory(engine: Engine, model: nn.Module) -> None:
    numbers = sum(tensor.numel() for tensor in model.parameters())
    numbers += sum(
        layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, QuantLinear)
    )
    needed, free = numbers * BYTES_A_PARAMETER, free_memory(torch.device("cpu"))
    if needed > free:
        raise DitqError(
            f"{engine.folder}: in float64 it takes {needed / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} are free"
        )


def _graphs_in_float64(engine: Engine, arguments: Mapping[str, Any]) -> Array:
    """The output of the graphs that one call runs, the text's first."""
    tensors = {
        name: (value.double() if value.is_floating_point() else value).numpy()
        for name, value in engine_inputs(engine, arguments).items()
    }
    results: list[Array] = []
    for name in [*([TEXT_GRAPH] if engine.text is not None else []), engine.graph_at(arguments.get(ARGUMENT))]:
        graph = widened(onnx.load(str(engine.folder / name)))
        run = ReferenceEvaluator(graph, new_ops=OPERATORS)  # type: ignore[arg-type]
        results = run.run(None, {value.name: tensors[value.name] for value in graph.graph.input})  # type: ignore[assignment]
        tensors |= {value.name: result for value, result in zip(graph.graph.output, results, strict=True)}
    return np.asarray(results[0])


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float64 in the place of float32: constants, inputs, outputs and what is cast."""
    for graph in _subgraphs(model.graph):
        for constant in graph.initializer:
            _widen(constant)
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            kind.elem_type = TensorProto.DOUBLE if kind.elem_type in _FLOATS else kind.elem_type
    functions = (node for function in model.functions for node in function.node)
    for node in (*functions, *(node for graph in _subgraphs(model.graph) for node in graph.node)):
        for attribute in node.attribute:
            _widen_attribute(node, attribute)
    return model


def _widen_attribute(node: NodeProto, attribute: AttributeProto) -> None:
    if attribute.type == AttributeProto.TENSOR:
        _widen(attribute.t)
    elif attribute.name == "value_float":
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.array(attribute.f))))
    elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in _FLOATS:
        attribute.i = TensorProto.DOUBLE


def _widen(constant: TensorProto) -> None:
    if constant.data_type in _FLOATS:
        values = numpy_helper.to_array(constant).astype(np.float64)
        constant.CopyFrom(numpy_helper.from_array(values, constant.name))


def _subgraphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _subgraphs(attribute.g)


# What ONNX's own reference lacks, or computes with constants of float32.


class Gelu(OpRun):
    """ONNX's Gelu."""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        return (F.gelu(torch.from_numpy(x), approximate=approximate).numpy(),)


class GatherElements(OpRun):
    """ONNX's GatherElements, whose reference fails where an axis is longer than NumPy's choose takes."""

    def _run(self, x: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        return (np.take_along_axis(x, indices.astype(np.int64), axis),)


class MultiHeadAttention(OpRun):
    """com.microsoft.MultiHeadAttention of queries, keys and values [B, N, H * D], which is all that an engine gives it."""

    op_domain = MICROSOFT

    def _run(self, q: Array, k: Array, v: Array, num_heads: int = 1, scale: float | None = None) -> tuple[Array]:
        query, key, value = (torch.from_numpy(x).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return (F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2).numpy(),)


class MatMulNBits(OpRun):
    """com.microsoft.MatMulNBits of 4 bits: x [.., K] times weights [N, K / block, block / 2] of two codes a byte."""

    op_domain = MICROSOFT

    def _run(self, x: Array, codes: Array, scales: Array, zero_points: Array | None = None, K: int = 0, N: int = 0,
             bits: int = 4, block_size: int = 32, **settings: Any) -> tuple[Array]:  # fmt: skip
        blocks = codes.shape[1]
        zeros: Any = 8
        if zero_points is not None:
            zeros = _nibbles(zero_points.reshape(N, -1))[:, :blocks, None]
        weight = (_nibbles(codes) - zeros) * scales.reshape(N, blocks, 1)
        return (x @ weight.reshape(N, -1)[:, :K].T,)


class MatMulIntegerToFloat(OpRun):
    """com.microsoft.MatMulIntegerToFloat: (a - zero of a) (b - zero of b), times both scales, plus a bias."""

    op_domain = MICROSOFT

    def _run(self, a: Array, b: Array, a_scale: Array, b_scale: Array, a_zero: Array | None = None,
             b_zero: Array | None = None, bias: Array | None = None) -> tuple[Array]:  # fmt: skip
        left = a.astype(np.float64) - (0 if a_zero is None else a_zero.astype(np.float64))
        right = b.astype(np.float64) - (0 if b_zero is None else b_zero.astype(np.float64))
        return (left @ right * a_scale * b_scale + (0 if bias is None else bias),)


def _nibbles(packed: Array) -> Array:
    """Two numbers a byte, the low one first, as float64."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float64)


OPERATORS = [Gelu, GatherElements, MultiHeadAttention, MatMulNBits, MatMulIntegerToFloat]
