"""Writing an engine folder: the model as the target's graph, its weights, engine.json. Whole or not at all."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ditq.errors import DitqError
from ditq.export.arguments import flatten
from ditq.export.engine import EXAMPLE, FORMAT_VERSION, GRAPH, MANIFEST, PLAIN, TEXT_GRAPH, Engine, as_json, first_line
from ditq.export.engine_files import hash_file
from ditq.export.onnx_graph import OUTPUT, ROUNDED_ATTENTION, TOKEN_ATTENTION, Axes, export_what_varies
from ditq.export.targets import PlannedMatMul, target
from ditq.export.text_graph import split_text
from ditq.export.weights_file import WEIGHTS, write_weights
from ditq.given import followed, name_of
from ditq.nn import QuantLinear, describe
from ditq.nn.structural.scheduled_block import edges_of, only, patterns_of


def write_engine(
    folder: str | Path,
    model: nn.Module,
    *,
    name: str,
    config: Mapping[str, Any],
    class_name: str,
    family: str | None,
    fingerprint: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Any],
    axes: Mapping[str, tuple[str | None, ...]],
    sizes: Mapping[str, tuple[int, int, int]] | None = None,
    picture: tuple[int, int] | None = None,
    sampling: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    reports: Sequence[Any] = (),
    target_name: str = "onnxruntime-cpu",
    changing: Collection[str] | None = None,
    keep_example: bool = False,
    force: bool = False,
    work: Path | None = None,
    accept: Callable[[Path], None] | None = None,
) -> Engine:
    """Write `model` (with its QuantLinears) as an engine folder.

    Args:
        name, config, class_name, family, fingerprint: of the checkpoint that the model came from.
        recipe: the recipe with all defaults filled in.
        inputs: example keyword arguments of the model's forward; axes: names of what may vary (`onnx_graph.to_onnx`).
        sizes: of each axis the smallest, the usual and the largest that plans are built for.
        picture: rows and columns of image tokens that it was calibrated on, where plans are for one picture.
        sampling: arguments of the pipeline's call that it was calibrated with, other than the checkpoint's own.
        quality: what was measured of it, or None; reports: one JSON value a pass.
        changing: arguments that change from step to step. What depends on none of them becomes a graph of its own, of
            which the loader keeps the results. None: one graph for everything.
        keep_example: whether `inputs` go into the engine, of a model for which they cannot be made up.
        force: replace an existing engine of that name, or what a symbolic link of that name stands for.
        work: a folder on the same disk that it is made in; None: one beside it.
        accept: looks at the finished folder before it takes its place, and may raise.

    Raises:
        DitqError: the folder exists (without force) or cannot be written; the model cannot be exported.
    """
    folder = followed(Path(folder))
    layers = {layer.site: layer for layer in model.modules() if isinstance(layer, QuantLinear)}
    with _written_beside(folder, force, work) as partial:
        lower, check = target(target_name).lower, target(target_name).check
        if lower is None and check is None:
            raise DitqError(f"target '{target_name}' runs engines but cannot be compiled for")
        if check is not None:
            check(model)
        patterns = patterns_of(model)
        exported, dropped = _exported(model, inputs, axes, patterns)  # also tells which axes of the inputs may vary
        described = [_describe(value) for value in exported[GRAPH].graph.inputs]
        # Where there are several graphs, each runs what it needs of the text itself.
        split = changing is not None and lower is not None and len(exported) == 1
        text = split_text(exported[GRAPH], changing or (), _timed(layers)) if split else None
        graphs = {} if lower is None else exported if text is None else {**exported, TEXT_GRAPH: text}
        planned: list[PlannedMatMul] = []
        for file_name, part in graphs.items():
            assert lower is not None
            planned += [dataclasses.replace(entry, graph=file_name) for entry in lower(part, layers)]
            _check_lowered(part, target_name)
            part.producer_name, part.producer_version = "ditq", _version()
            part.graph.name = class_name
        _check_finite(folder, model)
        # Metadata of more than one key would be written in no fixed order.
        write_weights(partial / WEIGHTS, model.state_dict(), list(graphs.values()), {"format": "pt"})
        for file_name, part in graphs.items():
            ir.save(part, partial / file_name)
        if keep_example:
            save_file({key: tensor.contiguous() for key, tensor in flatten(inputs)[0].items()}, partial / EXAMPLE)
        for file in partial.glob("*.safetensors"):
            file.chmod(partial.stat().st_mode & 0o666)  # safetensors makes it private
        manifest = {
            "format_version": FORMAT_VERSION,
            "ditq_version": _version(),
            "family": family,
            "class_name": class_name,
            "config": _portable(config),
            "source": {"name": name_of(name), "fingerprint": fingerprint}
            | ({"sampling": dict(sampling)} if sampling else {}),
            "target": target_name,
            "recipe": dict(recipe),
            "inputs": described,
            "output": OUTPUT,
            "layout": flatten(inputs)[1],
            "arguments": _arguments(model),
            "attributes": _attributes(model),
            "dropped_axes": dropped,
            "sizes": {axis: list(three) for axis, three in (sizes or {}).items()},
            "picture": None if picture is None else list(picture),
            "structure": describe(model),
            "graph": bool(graphs),
            "schedule": _schedule(model, patterns) if len(exported) > 1 else None,
            "text": None
            if text is None
            else {"inputs": _names(text.graph.inputs), "outputs": _names(text.graph.outputs)},
            "planned": [dataclasses.asdict(entry) for entry in planned],
            "reports": list(reports),
            "measured": None if quality is None else dict(quality),
            "files": {file.name: hash_file(file) for file in sorted(partial.iterdir())},
        }
        (partial / MANIFEST).write_text(as_json(manifest), encoding="utf-8")
        if accept is not None:
            accept(partial)
    return Engine(folder, json.loads(as_json(manifest)))


def _exported(
    model: nn.Module, inputs: Mapping[str, Any], axes: Axes, patterns: Sequence[tuple[bool, ...]]
) -> tuple[dict[str, ir.Model], list[str]]:
    """A graph for each set of blocks that runs at some timestep, by file; names of the axes that cannot vary."""
    graphs: dict[str, ir.Model] = {}
    dropped: list[str] = []
    for pattern in dict.fromkeys(patterns):
        with only(model, pattern):
            graphs[_graph_name(len(graphs))], fixed = export_what_varies(model, inputs, axes)
        dropped += [axis for axis in fixed if axis not in dropped]
    return graphs, dropped


def _graph_name(number: int) -> str:
    return f"model.{number}.onnx" if number else GRAPH


def _schedule(model: nn.Module, patterns: Sequence[tuple[bool, ...]]) -> dict[str, Any]:
    names = {pattern: _graph_name(number) for number, pattern in enumerate(dict.fromkeys(patterns))}
    return {"edges": edges_of(model), "graphs": [names[pattern] for pattern in patterns]}


def _check_lowered(graph: ir.Model, target_name: str) -> None:
    """Raises DitqError if an attention that a pass has changed is left in the graph, which the target does not know."""
    left = next((node for node in graph.graph if node.op_type in (ROUNDED_ATTENTION, TOKEN_ATTENTION)), None)
    if left is not None:
        site = left.attributes["site"].as_string()
        rounded = left.op_type == ROUNDED_ATTENTION
        kind = "quantize_attention" if rounded else left.attributes["kind"].as_string()
        what = "rounded attention" if rounded else kind.replace("_", " ")
        raise DitqError(f"target '{target_name}' cannot run the {what} of {site}; leave the pass {kind} out")


def _check_finite(folder: Path, model: nn.Module) -> None:
    """Raises DitqError for a number that a pass has made infinite or no number at all: the engine would draw black pictures."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise DitqError(f"{folder}: {name} is not finite after the passes; leave out the pass that makes it")


def check_replaceable(folder: Path) -> None:
    """Raises DitqError if something stands there that force must not remove: neither an engine nor an empty folder."""
    if folder.exists() and not _has_manifest(folder) and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise DitqError(f"{folder}: is not an engine, so it is not replaced even by force; give another place")


def _has_manifest(folder: Path) -> bool:
    """Whether its manifest is of an engine, or damaged beyond telling."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path.is_file()
    return isinstance(found, dict) and "format_version" in found


@contextmanager
def _written_beside(folder: Path, force: bool, work: Path | None) -> Iterator[Path]:
    """A new folder on the same disk that takes the place of `folder` at the end, or is gone after a failure."""
    if folder.exists() and not force:
        raise DitqError(f"{folder}: exists already; give another place or --force to replace it")
    check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=work or folder.absolute().parent) as made:
            partial, old = Path(made) / "new", Path(made) / "old"
            partial.mkdir()
            yield partial
            if folder.exists():
                folder.rename(old)
            try:
                partial.rename(folder)
            except BaseException:
                if old.exists():
                    old.rename(folder)
                raise
    except (OSError, SafetensorError) as error:  # safetensors hands on the operating system's error as text
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DitqError(f"{folder}: cannot be written: {reason}") from error


def _describe(value: ir.Value) -> dict[str, Any]:
    assert value.shape is not None and value.dtype is not None
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape}


def _timed(layers: Mapping[str, QuantLinear]) -> list[str]:
    return [site for site, layer in layers.items() if layer.activation.granularity == "timestep"]


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [value.name or "" for value in values]


def _arguments(model: nn.Module) -> list[str]:
    """The forward's arguments in order, for positional calls."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(model.forward).parameters.items() if parameter.kind in kinds]


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Plain numbers and words of the model's own, some of which pipelines read beside its config."""
    own = {name: value for name, value in vars(model).items() if not name.startswith("_") and name != "training"}
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, PLAIN)
        and not (isinstance(value, float) and not math.isfinite(value))  # JSON has no others
    }


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what belongs to one machine, such as the path it was loaded from."""
    kept = ("_class_name", "_diffusers_version")
    return {key: value for key, value in config.items() if not key.startswith("_") or key in kept}


def _version() -> str:
    try:
        return metadata.version("ditq")
    except metadata.PackageNotFoundError:
        return "source"
