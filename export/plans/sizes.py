"""The sizes that a plan takes: of each axis the smallest, the usual and the largest (TensorRT's optimization profile)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx

from ditq.errors import DitqError
from ditq.export.engine import GRAPH, TEXT_GRAPH, Engine
from ditq.suggest import unknown_key

Sizes = dict[str, tuple[int, int, int]]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

_PART = re.compile(r"(\w+)=(\d+)(?::(\d+):(\d+))?")


def axes_of(engine: Engine) -> list[str]:
    """Names of the axes of the engine's inputs that may vary."""
    shapes = (entry["shape"] for entry in engine.manifest["inputs"])
    return list(dict.fromkeys(size for shape in shapes for size in shape if isinstance(size, str)))


def parse_sizes(text: str) -> Sizes:
    """`batch=1:2:4,image_tokens=4096` as sizes by axis.

    Raises:
        DitqError: not of that form, or sizes that do not ascend from 1.
    """
    sizes: Sizes = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = _PART.fullmatch(part)
        if found is None:
            raise DitqError(f"sizes: {part!r} is not like image_tokens=256:1024:4096 or batch=1")
        axis, first, usual, last = found.groups()
        smallest, middle, largest = int(first), int(usual or first), int(last or first)
        if not 1 <= smallest <= middle <= largest:
            raise DitqError(f"sizes: {part!r} does not ascend from 1; give SMALLEST:USUAL:LARGEST")
        sizes[axis] = (smallest, middle, largest)
    return sizes


def sizes_of(engine: Engine, text: str | None = None) -> Sizes:
    """The sizes of each axis: those of `text` over what the engine says.

    Raises:
        DitqError: an axis that the engine does not have, or one of which nothing is known.
    """
    axes = axes_of(engine)
    sizes: Sizes = {axis: tuple(found) for axis, found in engine.manifest.get("sizes", {}).items() if axis in axes}
    for axis, three in parse_sizes(text or "").items():
        if axis not in axes:
            raise DitqError(unknown_key("sizes", axis, axes))
        sizes[axis] = three
    unknown = next((axis for axis in axes if axis not in sizes), None)
    if unknown is not None:
        raise DitqError(f"sizes: nothing is known of the axis '{unknown}'; give {unknown}=SMALLEST:USUAL:LARGEST")
    return sizes


def shapes_of(engine: Engine, graph: str, sizes: Sizes) -> Shapes:
    """The three shapes of each input of one of the engine's graphs."""
    described: Mapping[str, Any] = {entry["name"]: entry["shape"] for entry in engine.manifest["inputs"]}
    model = onnx.load(str(engine.folder / graph), load_external_data=False)
    made: list[dict[str, tuple[int, ...]]] = [{}, {}, {}]
    if graph == GRAPH and engine.text is not None:
        made = [_outputs(engine, described, sizes, which) for which in range(3)]
    shapes = {}
    for value in model.graph.input:
        a, b, c = (made[which].get(value.name) or _sized(described[value.name], sizes, which) for which in range(3))
        shapes[value.name] = (a, b, c)
    return shapes


def _sized(shape: list[int | str], sizes: Sizes, which: int) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else sizes[size][which] for size in shape)


def _outputs(engine: Engine, described: Mapping[str, Any], sizes: Sizes, which: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what the text's graph makes of inputs of these sizes."""
    model = onnx.load(str(engine.folder / TEXT_GRAPH), load_external_data=False)
    for value in model.graph.input:
        for dimension, size in zip(
            value.type.tensor_type.shape.dim, _sized(described[value.name], sizes, which), strict=True
        ):
            dimension.dim_value = size
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {}
    for value in inferred.graph.output:
        shape = tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        if not shape or 0 in shape:
            raise DitqError(f"{engine.name}: the shape of {value.name} cannot be told; compile with --no-cache-text")
        shapes[value.name] = shape
    return shapes
