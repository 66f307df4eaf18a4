"""The engine folder, opened: engine.json, weights.safetensors, model.onnx, checked. It is written by write.py.

No file in it can run code, and no file in it may lead out of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.arguments import is_part, unflatten
from ditq.export.engine_files import check_external_data, check_files, check_plans
from ditq.export.targets import PlannedMatMul
from ditq.export.weights_file import WEIGHTS
from ditq.given import path_of
from ditq.nn.structural.ordered_tokens import OrderedTokens
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.numerics.timestep_bins import bins_of
from ditq.numerics.token_layout import TokenLayout
from ditq.numerics.token_order import is_size

MANIFEST = "engine.json"
GRAPH = "model.onnx"
EXAMPLE = "example.safetensors"
TEXT_GRAPH = "text.onnx"
FORMAT_VERSION = 1
LARGEST_TIMESTEP = 1e9
PLAIN = (bool, int, float, str)

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
        folder = path_of("engine", folder)
        manifest = _read_manifest(folder)
        if folder.name in ("", ".."):  # which tell nothing of the engine, and something else from another folder
            folder = Path(os.path.abspath(folder))
        engine = cls(folder, manifest)
        check_files(folder, manifest["files"], required=(*engine.graphs, WEIGHTS), verify=verify)
        check_plans(folder, engine.plans, engine.graphs, manifest["files"])
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
    def attributes(self) -> dict[str, Any]:
        """Plain numbers and words of the original's own, by name."""
        return dict(self.manifest.get("attributes") or {})  # absent in engines from before they were kept

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, such as the picture's size, that it was calibrated with: those that are not the
        checkpoint's own."""
        return dict(self.manifest["source"].get("sampling", {}))  # absent in engines from before it was kept

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
    def example(self) -> dict[str, Any] | None:
        """Arguments of one call of the original, where the engine holds such: of a model that no family describes."""
        if EXAMPLE not in self.manifest["files"]:
            return None
        try:
            return unflatten(load_file(self.folder / EXAMPLE), self.manifest["layout"])
        except (KeyError, TypeError, SafetensorError) as error:
            raise DitqError(f"{self.folder}: {EXAMPLE} is damaged; compile the engine again") from error

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
        beside.write_text(as_json(manifest), encoding="utf-8")
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
    except (OSError, ValueError, RecursionError) as error:
        raise DitqError(f"{path}: damaged ({first_line(error)}); compile the engine again") from error
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
    for key, sound in _OPTIONAL.items():
        if manifest.get(key) is not None and not sound(manifest[key]):
            raise DitqError(f"{path}: damaged (no valid '{key}'); compile the engine again")
    if not all(_is_input(entry) for entry in manifest["inputs"]):
        raise DitqError(f"{path}: damaged (no valid 'inputs'); compile the engine again")
    if not all(is_part(part) for part in manifest["layout"].values()):
        raise DitqError(f"{path}: damaged (no valid 'layout'); compile the engine again")
    if not all(_tells_layout(part) for part in manifest["structure"].get("structural", [])):
        raise DitqError(f"{path}: damaged (no valid 'layout'); compile the engine again")
    return manifest


def _is_input(entry: Mapping[str, Any]) -> bool:
    known = isinstance(entry["dtype"], str) and isinstance(getattr(torch, entry["dtype"], None), torch.dtype)
    shape = entry["shape"]
    return (
        known
        and isinstance(entry["name"], str)
        and isinstance(shape, list)
        and all(isinstance(n, int | str) for n in shape)
    )


def _tells_layout(part: Mapping[str, Any]) -> bool:
    """Whether what a part knows of the picture's place among the tokens can be read, if it is told at all; of kinds that an
    engine is asked for before it runs it must be."""
    spec = part["spec"]
    asked = part["kind"] in (SparseAttention.kind, OrderedTokens.kind)
    if not isinstance(spec, dict) or "layout" not in spec:
        return not asked
    picture = spec.get("picture") if asked else None
    try:
        TokenLayout.from_spec(spec["layout"])
        return not picture or (len(picture) == 2 and all(is_size(side) for side in picture))
    except (AttributeError, TypeError, ValueError):
        return False


def _is_schedule(found: Any) -> bool:
    """Edges that are numbers, and the name of a graph for each bin between them."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), list) for key in ("edges", "graphs")):
        return False
    edges, graphs = found["edges"], found["graphs"]
    numbers = all(isinstance(edge, int | float) and abs(edge) <= LARGEST_TIMESTEP for edge in edges)
    falling = numbers and all(later < earlier for earlier, later in itertools.pairwise(edges))
    return falling and len(graphs) == len(edges) + 1 and all(isinstance(graph, str) for graph in graphs)


def _are_plain(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(value, PLAIN) for value in found.values())


_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "schedule": _is_schedule,
    "measured": lambda found: isinstance(found, dict),
    "attributes": _are_plain,
}


def _nested(manifest: Mapping[str, Any]) -> list[tuple[str, list[Any], set[str]]]:
    """What the entries of engine.json must hold themselves: (key, its entries, their keys)."""
    quantized = manifest["structure"].get("quantized")
    parts = manifest["structure"].get("structural", [])  # absent in engines from before there were such
    attentions = manifest["structure"].get("attentions", {})
    plans = manifest.get("plans", [])
    planned = {f.name for f in dataclasses.fields(PlannedMatMul) if f.default is dataclasses.MISSING}
    return [
        ("source", [manifest["source"]], {"name", "fingerprint"}),
        ("source", [manifest["source"].get("sampling", {})], set()),
        ("structure", [manifest["structure"]], {"quantized", "transformed", "factors", "biased"}),
        (
            "structure",
            list(quantized.values()) if isinstance(quantized, dict) else [None],
            {"bits", "activation", "codebook"},
        ),
        ("structure", parts if isinstance(parts, list) else [None], {"kind", "place", "spec"}),
        ("structure", list(attentions.values()) if isinstance(attentions, dict) else [None], set()),
        ("inputs", manifest["inputs"], {"name", "dtype", "shape"}),
        ("planned", manifest["planned"], planned),
        (
            "plans",
            plans if isinstance(plans, list) else [None],
            {"gpu", "library", "version", "sizes", "files", "layers"},
        ),
        ("text", [] if manifest.get("text") is None else [manifest["text"]], {"inputs", "outputs"}),
    ]


def _has(entry: Any, keys: set[str]) -> bool:
    return isinstance(entry, dict) and keys <= set(entry)


def as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=False, allow_nan=False) + "\n"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
