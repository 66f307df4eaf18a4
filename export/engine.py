"""The engine folder: engine.json, weights.safetensors, model.onnx. Written whole or not at all; checked when opened.

No file in it can run code, and no file in it may lead out of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
from safetensors import SafetensorError
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export.arguments import flatten
from ditq.export.engine_files import check_external_data, check_files, hash_file
from ditq.export.onnx_graph import OUTPUT, ROUNDED_ATTENTION, TOKEN_ATTENTION, Axes, export_what_varies
from ditq.export.targets import PlannedMatMul, target
from ditq.export.text_graph import split_text
from ditq.export.weights_file import WEIGHTS, write_weights
from ditq.nn import QuantLinear, describe
from ditq.nn.structural.scheduled_block import edges_of, only, patterns_of
from ditq.numerics.timestep_bins import bins_of

MANIFEST = "engine.json"
GRAPH = "model.onnx"
TEXT_GRAPH = "text.onnx"
FORMAT_VERSION = 1

_KEYS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "ditq_version": str,
    "family": (str, type(None)),
    "class_name": str,
    "config": dict,
    "source": dict,
    "target": str,
    "recipe": dict,
    "inputs": list,
    "layout": dict,
    "arguments": list,
    "dropped_axes": list,
    "structure": dict,
    "planned": list,
    "files": dict,
}


@dataclass(frozen=True)
class Engine:
    """An engine folder that has been opened and checked. `manifest` is its engine.json."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> Engine:
        """Open and check an engine.

        Args:
            verify: also compare the SHA-256 of each file with the one that was written down.

        Raises:
            DitqError: no engine there; a file that is missing, changed or outside the folder; another format version.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        engine = cls(folder, manifest)
        check_files(folder, manifest["files"], required=(*engine.graphs, WEIGHTS), verify=verify)
        for graph in engine.graphs:
            check_external_data(folder, graph, manifest["files"])
        return engine

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's config.json."""
        return dict(self.manifest["config"])

    @property
    def text(self) -> dict[str, Any] | None:
        """`inputs` and `outputs` of the graph that is run once for a text, by name; None in an engine of one graph."""
        found = self.manifest.get("text")  # absent in engines from before there was such a graph
        return None if found is None else dict(found)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The ONNX files; none of an engine for a target that builds the model itself."""
        if self.manifest.get("graph") is False:  # absent in engines from before there were such
            return ()
        main = (GRAPH,) if self.schedule is None else tuple(dict.fromkeys(self.schedule["graphs"]))
        return main if self.text is None else (*main, TEXT_GRAPH)

    @property
    def schedule(self) -> dict[str, Any] | None:
        """Of an engine whose model is not the same at all timesteps: `edges` between bins, falling; `graphs`, one a bin."""
        found = self.manifest.get("schedule")  # absent in engines from before there were such
        return None if found is None else dict(found)

    def graph_at(self, timestep: Tensor | None) -> str:
        """The graph that runs a call for this timestep [B]: of samples with several, it must be the same.

        Raises:
            DitqError: the samples of one call need different graphs.
        """
        if self.schedule is None:
            return GRAPH
        assert timestep is not None
        edges, graphs = self.schedule["edges"], self.schedule["graphs"]
        wanted = {graphs[number] for number in bins_of(timestep, edges).tolist()}
        if len(wanted) > 1:
            raise DitqError(
                f"{self.name}: runs other blocks at other timesteps, so one call cannot be for {timestep.tolist()}; "
                "call it for each timestep alone"
            )
        return str(wanted.pop())

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """`QuantLinear.spec()` by site."""
        return dict(self.manifest["structure"]["quantized"])

    @property
    def attentions(self) -> dict[str, dict[str, Any]]:
        """`AttentionRounding.spec()` by the attention's module."""
        return dict(self.manifest["structure"].get("attentions", {}))  # absent in engines from before there were such

    @cached_property
    def planned(self) -> list[PlannedMatMul]:
        """What each quantized linear is meant to run as."""
        try:
            return [PlannedMatMul(**entry) for entry in self.manifest["planned"]]
        except TypeError as error:
            raise DitqError(f"{self.folder}: engine.json is damaged ('planned'); compile the engine again") from error

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of each file by name."""
        return dict(self.manifest["files"])

    @property
    def plans(self) -> list[dict[str, Any]]:
        """What was built for single kinds of GPU, with its `gpu`, `library`, `version`, `sizes`, `files` by graph, `layers`."""
        return list(self.manifest.get("plans", []))  # absent in engines from before there were plans

    def update(self, **entries: Any) -> Engine:
        """Write more into engine.json (`measured=...`): a new Engine, the file replaced in one step."""
        manifest = {**self.manifest, **entries}
        beside = self.folder / f"{MANIFEST}.partial"
        beside.write_text(_as_json(manifest), encoding="utf-8")
        beside.replace(self.folder / MANIFEST)
        return Engine(self.folder, manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DitqError(f"{folder}: no such engine folder")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DitqError(
            f"{folder}: not an engine folder (it has no {MANIFEST}); compile one with: ditq compile"
        ) from error
    except (OSError, ValueError) as error:
        raise DitqError(f"{path}: damaged ({_first_line(error)}); compile the engine again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DitqError(
            f"{path}: engine format {version!r} is not known here (only {FORMAT_VERSION}); use the ditq that wrote it"
        )
    for key, kind in _KEYS.items():
        if key not in manifest or not isinstance(manifest[key], kind):
            raise DitqError(f"{path}: damaged (no valid '{key}'); compile the engine again")
    if bad := next(
        (key for key, entries, wanted in _nested(manifest) for entry in entries if not _has(entry, wanted)), None
    ):
        raise DitqError(f"{path}: damaged (no valid '{bad}'); compile the engine again")
    if manifest.get("schedule") is not None and not _is_schedule(manifest["schedule"]):
        raise DitqError(f"{path}: damaged (no valid 'schedule'); compile the engine again")
    return manifest


def _is_schedule(found: Any) -> bool:
    """Edges that are numbers, and the name of a graph for each bin between them."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), list) for key in ("edges", "graphs")):
        return False
    edges, graphs = found["edges"], found["graphs"]
    numbers = all(isinstance(edge, int | float) for edge in edges)
    return numbers and len(graphs) == len(edges) + 1 and all(isinstance(graph, str) for graph in graphs)


def _nested(manifest: Mapping[str, Any]) -> list[tuple[str, list[Any], set[str]]]:
    """What the entries of engine.json must hold themselves: (key, its entries, their keys)."""
    quantized = manifest["structure"].get("quantized")
    parts = manifest["structure"].get("structural", [])  # absent in engines from before there were such
    planned = {f.name for f in dataclasses.fields(PlannedMatMul) if f.default is dataclasses.MISSING}
    return [
        ("source", [manifest["source"]], {"name", "fingerprint"}),
        ("structure", [manifest["structure"]], {"quantized", "transformed", "factors", "biased"}),
        (
            "structure",
            list(quantized.values()) if isinstance(quantized, dict) else [None],
            {"bits", "activation", "codebook"},
        ),
        ("structure", parts if isinstance(parts, list) else [None], {"kind", "place", "spec"}),
        ("inputs", manifest["inputs"], {"name", "dtype", "shape"}),
        ("planned", manifest["planned"], planned),
        ("plans", manifest.get("plans", []), {"gpu", "library", "version", "sizes", "files", "layers"}),
        ("text", [] if manifest.get("text") is None else [manifest["text"]], {"inputs", "outputs"}),
    ]


def _has(entry: Any, keys: set[str]) -> bool:
    return isinstance(entry, dict) and keys <= set(entry)


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
    quality: Mapping[str, Any] | None = None,
    reports: Sequence[Any] = (),
    target_name: str = "onnxruntime-cpu",
    changing: Collection[str] | None = None,
    force: bool = False,
) -> Engine:
    """Write `model` (with its QuantLinears) as an engine folder.

    Args:
        name, config, class_name, family, fingerprint: of the checkpoint that the model came from.
        recipe: the recipe with all defaults filled in.
        inputs: example keyword arguments of the model's forward; axes: names of what may vary (`onnx_graph.to_onnx`).
        sizes: of each axis the smallest, the usual and the largest that plans are built for.
        picture: rows and columns of image tokens that it was calibrated on, where plans are for one picture.
        quality: what was measured of it, or None; reports: one JSON value a pass.
        changing: arguments that change from step to step. What depends on none of them becomes a graph of its own, of
            which the loader keeps the results. None: one graph for everything.
        force: replace an existing engine of that name.

    Raises:
        DitqError: the folder exists (without force) or cannot be written; the model cannot be exported.
    """
    folder = Path(folder)
    layers = {layer.site: layer for layer in model.modules() if isinstance(layer, QuantLinear)}
    with _written_beside(folder, force) as partial:
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
        # Metadata of more than one key would be written in no fixed order.
        write_weights(partial / WEIGHTS, model.state_dict(), list(graphs.values()), {"format": "pt"})
        for file_name, part in graphs.items():
            ir.save(part, partial / file_name)
        (partial / WEIGHTS).chmod(partial.stat().st_mode & 0o666)  # safetensors makes it private
        manifest = {
            "format_version": FORMAT_VERSION,
            "ditq_version": _version(),
            "family": family,
            "class_name": class_name,
            "config": _portable(config),
            "source": {"name": Path(name).name, "fingerprint": fingerprint},
            "target": target_name,
            "recipe": dict(recipe),
            "inputs": described,
            "output": OUTPUT,
            "layout": flatten(inputs)[1],
            "arguments": _arguments(model),
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
        (partial / MANIFEST).write_text(_as_json(manifest), encoding="utf-8")
    return Engine(folder, json.loads(_as_json(manifest)))


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


def check_replaceable(folder: Path) -> None:
    """Raises DitqError if something stands there that force must not remove: neither an engine nor an empty folder."""
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise DitqError(f"{folder}: is not an engine, so it is not replaced even by force; give another place")


@contextmanager
def _written_beside(folder: Path, force: bool) -> Iterator[Path]:
    """A new folder `<folder>.partial` that takes the place of `folder` at the end, or is gone after a failure."""
    if folder.exists() and not force:
        raise DitqError(f"{folder}: exists already; give another place or --force to replace it")
    check_replaceable(folder)
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old.partial")
    try:
        for leftover in (partial, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:  # safetensors hands on the operating system's error as text
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise DitqError(f"{folder}: cannot be written: {reason}") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)


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


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what belongs to one machine, such as the path it was loaded from."""
    kept = ("_class_name", "_diffusers_version")
    return {key: value for key, value in config.items() if not key.startswith("_") or key in kept}


def _version() -> str:
    try:
        return metadata.version("ditq")
    except metadata.PackageNotFoundError:
        return "source"


def _as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=False, allow_nan=False) + "\n"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
