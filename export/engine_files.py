"""Checks on the files of an engine folder: there, unchanged, and inside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from ditq.errors import DitqError


def hash_file(path: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": digest in hex}."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check_files(folder: Path, files: Mapping[str, Any], required: Sequence[str], verify: bool) -> None:
    """Check the files that engine.json lists.

    Raises:
        DitqError: one is missing, changed, outside the folder (by its name or through a link), or not listed at all.
    """
    for name in required:
        if name not in files:
            raise DitqError(f"{folder}: engine.json does not list {name}; compile the engine again")
    for name, entry in files.items():
        path = inside(folder, name, "engine.json")
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= set(entry):
            raise DitqError(f"{folder}: engine.json has no size and hash of {name}; compile the engine again")
        if not path.is_file():
            raise DitqError(f"{folder}: {name} is missing; copy the whole engine folder again")
        changed = path.stat().st_size != entry["bytes"] or (verify and hash_file(path)["sha256"] != entry["sha256"])
        if changed:
            raise DitqError(f"{folder}: {name} was changed since the engine was written; copy or compile it again")


def check_plans(
    folder: Path, plans: Sequence[Mapping[str, Any]], graphs: Sequence[str], files: Mapping[str, Any]
) -> None:
    """Check that plans have a file for each graph and one of layers, all of them among those that `check_files` checks.

    Raises:
        DitqError: a plan without them, or one that names a file that is not listed or outside the folder.
    """
    for plan in plans:
        if not isinstance(plan["files"], dict) or set(plan["files"]) != set(graphs):
            raise DitqError(
                f"{folder}: engine.json is damaged (a plan is not of the engine's graphs); compile the engine again"
            )
        for name in (*plan["files"].values(), plan["layers"]):
            inside(folder, name, "a plan in engine.json")
            if name not in files:
                raise DitqError(
                    f"{folder}: a plan reads {name!r}, which engine.json does not list; do not use this engine"
                )


def check_external_data(folder: Path, graph: str, files: Mapping[str, Any]) -> None:
    """Check that the graph reads its weights from listed files alone, within their bounds.

    Raises:
        DitqError: the graph is damaged, or points elsewhere.
    """
    try:
        model = onnx.load(str(folder / graph), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise DitqError(f"{folder}: {graph} is damaged; compile the engine again") from error
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        inside(folder, location, f"{graph}, tensor {tensor.name}")
        if location not in files:
            raise DitqError(
                f"{folder}: {graph} reads {location!r}, which engine.json does not list; do not use this engine"
            )
        start, length = entry.get("offset", "0"), entry.get("length", "0")
        if not all(_is_count(text) for text in (start, length)) or int(start) + int(length) > files[location]["bytes"]:
            raise DitqError(
                f"{folder}: {graph}: tensor {tensor.name} lies beyond the end of {location}; compile it again"
            )


def inside(folder: Path, name: Any, where: str) -> Path:
    """folder/name, or a DitqError when that is not a plain place within the folder, links followed."""
    hostile = DitqError(f"{folder}: {where} names {name!r}, which is outside the engine folder; do not use this engine")
    if not isinstance(name, str) or not name or "\\" in name or not name.isprintable():
        raise hostile
    pure = PurePosixPath(name)
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in pure.parts:
        raise hostile
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise hostile
    return path


def _is_count(text: str) -> bool:
    """Whether it is a whole number that fits 64 bits."""
    return text.isdecimal() and len(text) < 20


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph: initializers, constants in attributes, and those of inner graphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
