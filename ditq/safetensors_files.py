"""Safetensors files of a checkpoint, opened lazily: headers first, each tensor only when it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ditq.errors import DitqError

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file whose header has been read and checked against its length."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header.

        Raises:
            DitqError: missing, truncated, or with a header that does not fit the file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {}
                for name in file.keys():  # noqa: SIM118  safe_open is not a mapping
                    piece = file.get_slice(name)
                    tensors[name] = TensorInfo(tuple(piece.get_shape()), str(piece.get_dtype()))
                return cls(path, tensors, dict(file.metadata() or {}))
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DitqError(f"{path}: damaged or not a safetensors file ({reason}); fetch it again") from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype."""
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DitqError(f"{self.path}: the tensor {name} cannot be read: {error}") from error


def open_tensor_files(folder: Path, checkpoint: str) -> Iterator[TensorFile]:
    """The safetensors files of a transformer folder: by its index where there is one, else the single file.

    Raises:
        DitqError: no safetensors file, a shard that the index names is missing or lacks its tensors.
    """
    index = _index_of(folder)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
        plain = [file for file in files if file.name == "diffusion_pytorch_model.safetensors"]
        if not files:
            raise DitqError(f"{checkpoint}: no .safetensors file in {folder.name}/ (pickled weights are not read)")
        if len(files) > 1 and not plain:
            raise DitqError(
                f"{checkpoint}: several .safetensors files in {folder.name}/ but no index; cannot choose one"
            )
        yield TensorFile.open((plain or files)[0])
        return
    places = _read_index(index)
    for shard in sorted(set(places.values())):
        path = folder / shard
        if Path(shard).name != shard or shard in ("", ".."):
            raise DitqError(f"{index}: names {shard!r}, which is outside the folder")
        if not path.exists():
            raise DitqError(f"{checkpoint}: the shard {shard} that {index.name} names is missing; fetch it again")
        file = TensorFile.open(path)
        for name, place in places.items():
            if place == shard and name not in file.tensors:
                raise DitqError(f"{checkpoint}: {index.name} says that {name} is in {shard}, but it is not")
        yield file


def _index_of(folder: Path) -> Path | None:
    exact = folder / INDEX
    if exact.exists():
        return exact
    found = sorted(folder.glob("*.safetensors.index*.json"))
    return found[0] if found else None


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DitqError(f"{path}: not a safetensors index (needs an object with weight_map)") from error
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise DitqError(f"{path}: weight_map should map tensor names to file names")
    return places
