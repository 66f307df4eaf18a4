"""A graph as TensorRT takes it: all that is made of weights alone is computed once, weights stand on their carriers.

In the file of an engine codes are packed, and operators on constants expand them. TensorRT wants constants in front of a
DequantizeLinear. So these operators are run here, by ONNX Runtime, and what they make become constants of 8 or 4 bits; the
file on disk stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from ditq.export.plans.four_bit import in_own_operators, is_fp4
from ditq.export.session import WEIGHTS_FOLDER, open_session, session_options

Array = np.ndarray[Any, Any]

_FLOAT8, _INT4 = int(TensorProto.FLOAT8E4M3FN), int(TensorProto.INT4)
_AT_ONCE = 32  # values that one session computes: few enough that what is in between does not fill the memory
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class Folded:
    """proto: the graph, in which large constants have a name, type and shape only; constants: their bytes by name."""

    proto: onnx.ModelProto
    constants: dict[str, Array]


def fold(path: Path, known: Mapping[str, Array] | None = None) -> Folded:
    """An engine's graph, folded. known: values of the graph, by name, that are to be constants of these contents.

    Raises:
        DitqError: ONNX Runtime does not take the operators on weights.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    _fix(graph, known or {})
    constants = {tensor.name for tensor in graph.initializer}
    fixed, varying = _split(graph.node, constants)
    made = {output for node in fixed for output in node.output}
    read = [name for node in varying for name in node.input if name in made]
    read += [value.name for value in graph.output if value.name in made]
    arrays = _computed(model, fixed, list(dict.fromkeys(read)), path.parent)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    del folded.graph.node[:], folded.graph.initializer[:]
    narrowed: dict[str, onnx.TensorProto] = {}
    for node in varying:
        kind = _narrow_kind(node)
        source = node.input[0] if node.input else ""
        if kind is not None and (source in arrays or source in stored):
            narrowed[node.output[0]] = _narrow(node.output[0], _array(source, arrays, stored, path.parent), kind)
        else:
            folded.graph.node.append(node)
    narrowed |= {
        tensor.name: tensor
        for tensor in in_own_operators(folded, lambda name: _array(name, arrays, stored, path.parent))
    }
    outputs = [value.name for value in graph.output]
    used = {name for node in folded.graph.node for name in node.input} | set(outputs)
    if known:  # what they were made of may be read by nothing else
        used = _prune(folded.graph, outputs)
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used]
    tensors += [_in_memory(tensor, path.parent) for tensor in graph.initializer if tensor.name in used]
    tensors += narrowed.values()
    return _apart(folded, tensors)


def _fix(graph: onnx.GraphProto, known: Mapping[str, Array]) -> None:
    """Put constants in the place of the nodes that make these values."""
    for node in [node for node in graph.node if node.output and node.output[0] in known]:
        graph.node.remove(node)
        graph.initializer.append(numpy_helper.from_array(known[node.output[0]], node.output[0]))


def _prune(graph: onnx.GraphProto, outputs: Sequence[str]) -> set[str]:
    """Take out nodes and inputs that no output is made of; the names of all values that are left."""
    used = ancestors(outputs, {output: node for node in graph.node for output in node.output})
    for part in (graph.node, graph.input):
        kept = [item for item in part if used & set(getattr(item, "output", None) or [item.name])]
        del part[:]
        part.extend(kept)
    return used


def _array(name: str, made: Mapping[str, Array], stored: Mapping[str, onnx.TensorProto], folder: Path) -> Array:
    """A constant of the graph, or what operators made of such."""
    return made[name] if name in made else numpy_helper.to_array(_in_memory(stored[name], folder))


def _split(nodes: Iterable[onnx.NodeProto], constants: set[str]) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """(nodes that compute with constants alone, the others); `constants` grows by what the former make."""
    fixed, varying = [], []
    for node in nodes:
        inputs = [name for name in node.input if name]
        folds = bool(inputs) and all(name in constants for name in inputs)
        folds = folds and node.op_type not in ("DequantizeLinear", "QuantizeLinear") and _narrow_kind(node) is None
        folds = folds and not is_fp4(node)
        if folds and not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            fixed.append(node)
            constants.update(node.output)
        else:
            varying.append(node)
    return fixed, varying


def _narrow_kind(node: onnx.NodeProto) -> int | None:
    """The type of fewer than 8 bits, or of FP8, that a Cast makes."""
    if node.op_type != "Cast":
        return None
    kind = next(attribute.i for attribute in node.attribute if attribute.name == "to")
    return kind if kind in (_FLOAT8, _INT4) else None


def _computed(
    model: onnx.ModelProto, fixed: Sequence[onnx.NodeProto], names: Sequence[str], folder: Path
) -> dict[str, Array]:
    """What the fixed nodes make, by name."""
    makers = {output: node for node in fixed for output in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    arrays: dict[str, Array] = {}
    for start in range(0, len(names), _AT_ONCE):
        wanted = names[start : start + _AT_ONCE]
        needed = ancestors(wanted, makers)
        part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        part.graph.name = "weights"
        part.graph.node.extend(node for node in fixed if any(output in needed for output in node.output))
        part.graph.initializer.extend(tensors[name] for name in sorted(needed & set(tensors)))
        for name in wanted:
            part.graph.output.add().name = name
        options = session_options(threads=1)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(folder.resolve()))
        session = open_session(part.SerializeToString(), options)
        arrays |= dict(zip(wanted, session.run(list(wanted), {}), strict=True))
    return arrays


def ancestors(names: Iterable[str], makers: dict[str, onnx.NodeProto]) -> set[str]:
    """The names and all that they are made of."""
    left, seen = list(names), set()
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += makers[name].input if name in makers else []
    return seen


def _narrow(name: str, array: Array, kind: int) -> onnx.TensorProto:
    """Whole numbers from -8 to 7 two a byte, the first in the low half; others as FP8 numbers."""
    if kind == _FLOAT8:
        raw = array.astype(ml_dtypes.float8_e4m3fn).tobytes()
    else:
        nibbles = np.resize(array.astype(np.int8).reshape(-1) & 15, array.size + array.size % 2).astype(np.uint8)
        raw = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    return onnx.helper.make_tensor(name, kind, array.shape, raw, raw=True)


def _in_memory(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    """The initializer with its bytes, where they lie in the file of weights."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    onnx.external_data_helper.load_external_data_for_tensor(loaded, str(folder))
    loaded.ClearField("external_data")
    loaded.data_location = TensorProto.DEFAULT
    return loaded


def _apart(model: onnx.ModelProto, tensors: Iterable[onnx.TensorProto]) -> Folded:
    """Large constants beside the graph: a message of more than 2 GB cannot be written."""
    constants: dict[str, Array] = {}
    for tensor in tensors:
        if len(tensor.raw_data) > _INLINE_BYTES:
            constants[tensor.name] = np.frombuffer(tensor.raw_data, np.uint8)
            empty = model.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            empty.data_location = TensorProto.EXTERNAL
            empty.external_data.add(key="location", value="memory")
        else:
            model.graph.initializer.append(tensor)
    return Folded(model, constants)
