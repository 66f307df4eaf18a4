"""The sizes that a plan takes: of each axis the smallest, the usual and the largest (TensorRT's optimization profile).

Where a token attention reads the picture's size off positions, shapes would depend on what an input holds. Then a plan is for
one picture, whose rows and columns are constants in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import onnx

from ditq.errors import DitqError
from ditq.export.engine import GRAPH, TEXT_GRAPH, Engine
from ditq.export.lowering.token_attentions.tokens import COLUMNS, ROWS
from ditq.export.plans.fold import ancestors
from ditq.export.session import WEIGHTS_FOLDER, open_session, session_options
from ditq.numerics.token_layout import TokenLayout
from ditq.suggest import unknown_key

Sizes = dict[str, tuple[int, int, int]]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

_PART = re.compile(r"(\w+)=(\d+)(?::(\d+):(\d+))?")
_PICTURE = re.compile(r"picture=([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Picture:
    """What a plan is built for: rows and columns of image tokens, and the argument that tells them in a call."""

    height: int
    width: int
    layout: TokenLayout

    @property
    def constants(self) -> dict[str, Any]:
        """Values of the graph that it makes known."""
        return {name: np.array([size], np.int64) for name, size in ((ROWS, self.height), (COLUMNS, self.width))}

    def __str__(self) -> str:
        return f"{self.height} x {self.width} tokens"


def axes_of(engine: Engine) -> list[str]:
    """Names of the axes of the engine's inputs that may vary."""
    shapes = (entry["shape"] for entry in engine.manifest["inputs"])
    return list(dict.fromkeys(size for shape in shapes for size in shape if isinstance(size, str)))


def parse_sizes(text: str) -> Sizes:
    """`batch=1:2:4,image_tokens=4096` as sizes by axis.

    Raises:
        DitqError: not of that form, or sizes that do not ascend from 1.
    """
    if not isinstance(text, str):
        raise DitqError(f"sizes is {text!r}; give a word such as image_tokens=256:1024:4096,batch=1")
    sizes: Sizes = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if _PICTURE.fullmatch(part):
            continue
        found = _PART.fullmatch(part)
        if found is None:
            raise DitqError(
                f"sizes: {part!r} is not like image_tokens=256:1024:4096, batch=1, or picture=ROWSxCOLUMNS of image tokens"
            )
        axis, first, usual, last = found.groups()
        smallest, middle, largest = int(first), int(usual or first), int(last or first)
        if not 1 <= smallest <= middle <= largest:
            raise DitqError(f"sizes: {part!r} does not ascend from 1; give SMALLEST:USUAL:LARGEST")
        sizes[axis] = (smallest, middle, largest)
    return sizes


def sizes_of(engine: Engine, text: str | None = None) -> Sizes:
    """The sizes of each axis: those of `text` over what the engine says. Of a plan for one picture, image tokens are its.

    Raises:
        DitqError: an axis that the engine does not have, or one of which nothing is known.
    """
    axes = axes_of(engine)
    sizes: Sizes = {axis: tuple(found) for axis, found in engine.manifest.get("sizes", {}).items() if axis in axes}
    for axis, three in parse_sizes(text or "").items():
        if axis not in axes:
            raise DitqError(unknown_key("sizes", axis, axes))
        sizes[axis] = three
    picture = picture_of(engine, text)
    image = None if picture is None else _image_axis(engine, picture.layout)
    if picture is not None and isinstance(image, str):
        sizes[image] = (picture.height * picture.width,) * 3
    unknown = next((axis for axis in axes if axis not in sizes), None)
    if unknown is not None:
        raise _unknown(unknown)
    return sizes


def _unknown(axis: str) -> DitqError:
    return DitqError(f"sizes: nothing is known of the axis '{axis}'; give {axis}=SMALLEST:USUAL:LARGEST")


def picture_of(engine: Engine, text: str | None = None) -> Picture | None:
    """The picture that a plan of the engine is for: `picture=ROWSxCOLUMNS` of `text`; else the squarest of as many tokens as
    `text` says; else that of calibration. None where a plan takes any.

    Raises:
        DitqError: one is asked for where a plan takes any, or several sizes where it takes one.
    """
    parts = [piece.strip() for piece in (text or "").split(",")]
    asked = next((found for part in parts if (found := _PICTURE.fullmatch(part))), None)
    layout = told_by_positions(engine)
    if layout is None:
        if asked is not None:
            raise DitqError("sizes: plans of this engine are not for one picture; leave picture out, and give axes")
        return None
    axis, given = _image_axis(engine, layout), parse_sizes(text or "")
    wanted = given.get(axis) if isinstance(axis, str) else (axis,) * 3
    if wanted is not None and wanted[0] != wanted[2]:
        raise DitqError(
            f"sizes: with windows or linear attention a plan of this model is for one picture; give {axis}=NUMBER, or "
            "picture=ROWSxCOLUMNS of image tokens"
        )
    height, width = (0, 0) if asked is None else map(int, asked.groups())
    if asked is None and wanted is None:
        height, width = engine.manifest.get("picture") or (0, 0)
    if not height:
        tokens = (wanted or engine.manifest.get("sizes", {}).get(axis) or (0, 0))[1]
        if not tokens:
            raise _unknown(str(axis))
        height = next(n for n in range(isqrt(tokens), 0, -1) if tokens % n == 0)
        width = tokens // height
    elif wanted is not None and wanted[1] != height * width:
        raise DitqError(f"sizes: picture={height}x{width} are {height * width} image tokens, but {axis} is {wanted[1]}")
    return Picture(height, width, layout)


def told_by_positions(engine: Engine) -> TokenLayout | None:
    """How token attentions of the engine read the picture's size off positions; None where they do not, or there are none."""
    parts = engine.manifest["structure"].get("structural", [])
    layouts = (TokenLayout.from_spec(part["spec"]["layout"]) for part in parts if "layout" in part["spec"])
    return next((layout for layout in layouts if layout.positions is not None), None)


def _image_axis(engine: Engine, layout: TokenLayout) -> int | str:
    """The number of positions: the name of its axis, or the number where it is fixed."""
    described = {entry["name"]: entry["shape"] for entry in engine.manifest["inputs"]}
    found: int | str = described[layout.positions][-2]
    return found


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
    given = {value.name: _sized(described[value.name], sizes, which) for value in model.graph.input}
    for value in model.graph.input:
        for dimension, size in zip(value.type.tensor_type.shape.dim, given[value.name], strict=True):
            dimension.dim_value = size
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in inferred.graph.output
    }
    unknown = [name for name, shape in shapes.items() if not shape or 0 in shape]
    return shapes | _run(model, given, unknown, engine)


def _run(
    model: onnx.ModelProto, given: Mapping[str, tuple[int, ...]], names: list[str], engine: Engine
) -> dict[str, tuple[int, ...]]:
    """Shapes of outputs that inference cannot tell, such as a mask's: what they are made of is run on zeros."""
    if not names:
        return {}
    needed = ancestors(names, {output: node for node in model.graph.node for output in node.output})
    for part in (model.graph.node, model.graph.input, model.graph.initializer, model.graph.output):
        kept = [
            item for item in part if _name(item) in needed and (part is not model.graph.output or item.name in names)
        ]
        del part[:]
        part.extend(kept)
    options = session_options(threads=1)
    options.add_session_config_entry(WEIGHTS_FOLDER, str(engine.folder.resolve()))
    session = open_session(model.SerializeToString(), options)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    zeros = {name: np.zeros(given[name], onnx.helper.tensor_dtype_to_np_dtype(kind)) for name, kind in kinds.items()}
    return {name: array.shape for name, array in zip(names, session.run(names, zeros), strict=True)}


def _name(item: Any) -> str:
    return str(item.output[0] if hasattr(item, "op_type") else item.name)
