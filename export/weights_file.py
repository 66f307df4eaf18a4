"""The engine's one file of weights: the model's state dict as safetensors, into which the ONNX initializers point."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "weights.safetensors"
INLINE_BYTES = 1024  # smaller initializers stay in model.onnx, where shape inference wants them
EXTRA = "onnx."  # prefix of tensors that only the graph has, such as a position grid
_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "BOOL": ir.DataType.BOOL,
}


def narrowed(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 or float16 where that holds every one of its values exactly, else as it is.

    A parameter that no pass touched so returns to the dtype of its checkpoint.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.float32 and tensor.nbytes > INLINE_BYTES:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).float(), tensor):
                return tensor.to(dtype)
    return tensor


def write_weights(
    path: Path, state: Mapping[str, Tensor], graphs: Sequence[ir.Model], metadata: dict[str, str]
) -> None:
    """Write `state` and the graphs' own large constants to `path`, then make the large initializers point into it.

    An initializer that is stored narrower than the graph wants it is widened by a Cast, which the runtime folds.
    """
    stored = {name: narrowed(tensor) for name, tensor in state.items()}
    places: list[dict[str, str]] = [{} for _ in graphs]
    for graph, named in zip(graphs, places, strict=True):
        for name, value in graph.graph.initializers.items():
            assert value.const_value is not None
            if value.const_value.nbytes <= INLINE_BYTES:
                continue
            named[name] = name
            if name not in state:
                tensor = narrowed(torch.from_numpy(value.const_value.numpy().copy()))
                named[name] = _place(stored, EXTRA + name, tensor)
                stored[named[name]] = tensor
    save_file(_untied(stored), path, metadata)
    entries = read_header(path)
    for graph, named in zip(graphs, places, strict=True):
        first = next(iter(graph.graph))
        for name, place in named.items():
            _point(graph, first, graph.graph.initializers[name], entries[place], path)


def _place(stored: Mapping[str, Tensor], name: str, tensor: Tensor) -> str:
    """A name for `tensor` that is free or already its own: graphs may use one name for different constants."""
    found, number = name, 1
    while found in stored and (stored[found].dtype != tensor.dtype or not torch.equal(stored[found], tensor)):
        number += 1
        found = f"{name}.{number}"
    return found


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory, each with its own: the format knows no ties."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tied = tensor.untyped_storage().data_ptr() in seen
        result[name] = tensor.clone() if tied else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return result


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the file: bytes [offset, offset + length)."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> dict[str, Entry]:
    """The place of every tensor of a safetensors file that ditq has just written."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Entry(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + start, stop - start)
        for name, entry in header.items()
        for start, stop in [entry["data_offsets"]]
    }


def _point(graph: ir.Model, first: ir.Node, value: ir.Value, entry: Entry, path: Path) -> None:
    assert value.name is not None and value.const_value is not None
    wanted, name = value.const_value.dtype, value.name
    tensor = ir.ExternalTensor(
        WEIGHTS, entry.offset, entry.length, entry.dtype, shape=ir.Shape(entry.shape), name=name, base_dir=path.parent
    )
    if entry.dtype == wanted:
        value.const_value = tensor
        return
    del graph.graph.initializers[name]
    stored = ir.Value(name=name, const_value=tensor, shape=ir.Shape(entry.shape), type=ir.TensorType(entry.dtype))
    graph.graph.register_initializer(stored)
    cast = ir.node("Cast", [stored], {"to": wanted}, name=f"{name}/widened")
    cast.outputs[0].name = f"{name}/widened"
    cast.outputs[0].shape, cast.outputs[0].type = ir.Shape(entry.shape), ir.TensorType(wanted)
    graph.graph.insert_before(first, cast)
    value.replace_all_uses_with(cast.outputs[0])
