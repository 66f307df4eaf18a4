"""Statistics of every linear input, by timestep bin: what passes read to choose scales, rotations and codes.

`Statistics` is a folder (statistics.json and safetensors files) or the same in memory; input_statistics.py is one input.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditq.calibration.input_statistics import PARTS, InputStatistics
from ditq.calibration.step_weights import StepWeights
from ditq.calibration.storage import make_folder, tensor_digest, write_json, write_tensors
from ditq.calibration.triangles import packed, unpacked
from ditq.checkpoint import read_json
from ditq.errors import DitqError
from ditq.safetensors_files import TensorFile

if TYPE_CHECKING:
    from ditq.graph import DiTGraph

INDEX = "statistics.json"
TRAJECTORIES = "trajectories"  # the folder beside it that holds the recorded calls
FORMAT = "ditq statistics"
FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)  # 1 held second moments whole
KEPT_IN_MEMORY = 2 << 30  # bytes of inputs that stay in memory once read from a folder


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of all inputs of a model.

    Attributes:
        groups: name of the input group -> its statistics; from a folder, each is read when it is asked for.
        sites: name of the input group -> the linears that read it.
        metadata: where they come from: checkpoint, conditions, steps, seed, bins and the versions.
        step_weights: what an error at each step is worth in the end; None where that was not measured.
    """

    groups: Mapping[str, InputStatistics]
    sites: Mapping[str, tuple[str, ...]]
    metadata: dict[str, Any]
    step_weights: StepWeights | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint that they were collected with."""
        return self.metadata["checkpoint"]["fingerprint"]

    @property
    def bins(self) -> int:
        """The number of timestep bins."""
        return self.metadata["bins"]

    def sampling_beside(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that pictures were drawn with, such as their size, other than these; but not in how many steps,
        which may have been few to save time."""
        drawn = self.metadata.get("sampling_arguments", {})
        return {
            name: value
            for name, value in drawn.items()
            if name != "num_inference_steps" and (name not in own or own[name] != value)
        }

    def bin_weights(self, kind: str = "effect") -> Tensor:
        """[B]: the step weights of that kind (step_weights.py) by timestep bin, as `InputStatistics.hessian` takes them.

        Raises:
            DitqError: they were not measured.
        """
        return self._measured().by_bin(self.bins, kind)

    def weights_of_steps(self, kind: str = "effect") -> Tensor:
        """[T]: the step weights of that kind, first step first. Raises DitqError when they were not measured."""
        return self._measured().by_step(kind)

    def _measured(self) -> StepWeights:
        if self.step_weights is None:
            raise DitqError(
                "these statistics hold no step weights; measure them with `ditq calibrate --resume --step-weights`"
            )
        return self.step_weights

    @property
    def folder(self) -> Path | None:
        """Where they are stored; None for statistics in memory."""
        return self.groups.folder if isinstance(self.groups, _StoredGroups) else None

    def check(self, graph: DiTGraph) -> None:
        """Raise DitqError unless they hold every input that the graph's model uses, in its width."""
        widths = self.groups.widths if isinstance(self.groups, _StoredGroups) else _widths(self.groups)
        for name, group in graph.groups.items():
            if all(graph.sites[site].role == "unused" for site in group.sites):
                continue
            if name not in widths:
                raise DitqError(f"the statistics do not hold the input of {name}; calibrate again with this checkpoint")
            if widths[name] != group.width:
                raise DitqError(
                    f"the statistics of {name} have {widths[name]} channels, the model has {group.width}; "
                    "calibrate again with this checkpoint"
                )

    def save(self, folder: str | Path) -> None:
        """Write them into a folder, each file whole or not at all. Raises DitqError when that is not possible."""
        folder = Path(folder)
        path = folder / "statistics.safetensors"
        if isinstance(self.groups, _StoredGroups) and self.groups.folder == folder:
            return
        described = write_groups(path, self.groups, self.sites, {})
        if self.step_weights is not None:
            self.step_weights.write(folder)
        write_index(folder, self.metadata, described)

    @classmethod
    def open(cls, folder: str | Path, fingerprint: str | None = None, graph: DiTGraph | None = None) -> Statistics:
        """Open a folder of statistics; with `fingerprint` or `graph`, only those of that checkpoint or that model.

        Raises DitqError for a folder that holds none, another format version, another checkpoint, a damaged file, and
        inputs that are missing or have another width than the graph's. A changed byte is found when an input is read.
        """
        folder = Path(folder)
        path = folder / INDEX
        if not path.is_file():
            raise DitqError(f"{folder}: not a statistics folder (no {INDEX}); make one with `ditq calibrate`")
        index = read_json(path)
        if index.get("format") != FORMAT:
            raise DitqError(f"{path}: not written by ditq; give a folder made by `ditq calibrate`")
        if index.get("version") not in READ_VERSIONS:
            version = index.get("version")
            raise DitqError(f"{path}: has format version {version}, this ditq reads {FORMAT_VERSION}; calibrate again")
        try:
            del index["format"], index["version"]
            described = {str(name): dict(entry) for name, entry in index.pop("groups").items()}
            found, bins = str(index["checkpoint"]["fingerprint"]), int(index["bins"])
            groups = _StoredGroups(folder, described, bins)
            sites = {name: tuple(entry["sites"]) for name, entry in described.items()}
            dict(index.get("sampling_arguments", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DitqError(f"{path}: damaged or incomplete; calibrate again") from error
        if fingerprint is not None and found != fingerprint:
            raise DitqError(
                f"{folder}: these statistics are of another checkpoint "
                f"({index['checkpoint'].get('name')}, {found[:12]}); calibrate this one"
            )
        weights = StepWeights.read(folder)
        if weights is not None and len(weights.effect) != index.get("steps", len(weights.effect)):
            raise DitqError(
                f"{folder}: its step weights are of {len(weights.effect)} steps, not {index['steps']}; remove them and "
                "calibrate again with --resume --step-weights"
            )
        statistics = cls(groups, sites, index, weights)
        if graph is not None:
            statistics.check(graph)
        return statistics


class _StoredGroups(Mapping[str, InputStatistics]):
    """The inputs in a folder, read when asked for and checked against their digest; the last ones stay in memory."""

    def __init__(self, folder: Path, described: Mapping[str, Mapping[str, Any]], bins: int) -> None:
        self.folder = folder
        self.widths = {name: int(entry["width"]) for name, entry in described.items()}
        self._files = {name: str(entry["file"]) for name, entry in described.items()}
        self._digests = {name: str(entry["sha256"]) for name, entry in described.items()}
        self._read: OrderedDict[str, InputStatistics] = OrderedDict()
        for file in sorted(set(self._files.values())):
            self._check_header(file, bins)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> InputStatistics:
        if name not in self._read:
            self._read[name] = self._load(name)
            while len(self._read) > 1 and sum(map(_size, self._read.values())) > KEPT_IN_MEMORY:
                self._read.popitem(last=False)
        self._read.move_to_end(name)
        return self._read[name]

    def _load(self, name: str) -> InputStatistics:
        path = self.folder / self._files[name]
        try:
            with safe_open(str(path), framework="pt") as file:
                read = {part: file.get_tensor(f"{name}.{part}") for part in PARTS}
                if read["second_moment"].dim() == 2:
                    read["second_moment"] = unpacked(read["second_moment"], self.widths[name])
        except (SafetensorError, OSError) as error:
            raise DitqError(f"{path}: the statistics of {name} cannot be read ({error}); calibrate again") from error
        found = InputStatistics(*read.values())
        if _digest(found) != self._digests[name]:
            raise DitqError(f"{path}: the statistics of {name} were changed or damaged; calibrate again")
        return found

    def _check_header(self, file: str, bins: int) -> None:
        path = self.folder / file
        if Path(file).name != file:
            raise DitqError(f"{self.folder / INDEX}: names {file!r}, which is outside the folder")
        try:
            tensors = TensorFile.open(path).tensors
        except DitqError as error:
            raise DitqError(f"{path}: missing, truncated or damaged; calibrate again") from error
        for name, place in self._files.items():
            width = self.widths[name]
            moments = [(number, width * (width + 1) // 2) for number in (bins, 1)] + [(bins, width, width)]
            shapes: dict[str, list[Any]] = {"count": [(bins,)], "second_moment": moments, "total": [(bins, width)]}
            for part, known in shapes.items():
                info = tensors.get(f"{name}.{part}")
                if place == file and (info is None or info.shape not in known):
                    raise DitqError(f"{path}: does not hold the statistics of {name} as {INDEX} says; calibrate again")


def write_groups(
    path: Path,
    groups: Mapping[str, InputStatistics],
    sites: Mapping[str, tuple[str, ...]],
    settings: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Write inputs into one safetensors file; returns what statistics.json says of each, which is also its metadata."""
    make_folder(path.parent)
    tensors, described = {}, {}
    for name, found in groups.items():
        for part, tensor in found.parts().items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
        tensors[f"{name}.second_moment"] = packed(found.second_moment)
        described[name] = {
            "width": found.width,
            "sites": list(sites[name]),
            "file": path.name,
            "sha256": _digest(found),
        }
    write_tensors(path, tensors, {"settings": dict(settings), "groups": described})
    return described


def read_groups(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """What `write_groups` returned for this file, when it was written with the same settings; else None."""
    if not path.exists():
        return None
    metadata = json.loads(TensorFile.open(path).metadata.get("ditq", "{}"))
    same = metadata.get("settings") == json.loads(json.dumps(dict(settings)))
    return metadata["groups"] if same else None


def write_index(folder: Path, metadata: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]]) -> None:
    """Write statistics.json, which makes the folder complete."""
    head = {"format": FORMAT, "version": FORMAT_VERSION}
    write_json(folder / INDEX, {**head, **metadata, "groups": dict(described)})


def _digest(found: InputStatistics) -> str:
    return tensor_digest(*found.parts().values())


def _size(found: InputStatistics) -> int:
    return sum(part.nbytes for part in found.parts().values())


def _widths(groups: Mapping[str, InputStatistics]) -> dict[str, int]:
    return {name: found.width for name, found in groups.items()}
