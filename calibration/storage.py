"""Writing calibration files whole or not at all: beside their place, then renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ditq.errors import DitqError
from ditq.numerics.raw_bytes import raw_bytes

PARTIAL = ".partial"  # ending of what is not finished yet


def ditq_version() -> str:
    """The version that files are signed with."""
    try:
        return metadata.version("ditq")
    except metadata.PackageNotFoundError:
        return "source tree"


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it becomes `path` when the block ends and is removed when the block raises.

    Raises DitqError, naming `path`, when the disk is full or the folder is not writable.
    """
    beside = path.with_name(path.name + PARTIAL)
    try:
        with _disk_errors(path):
            yield beside
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to `path`."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with writing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file with `metadata`, as JSON, under the one key "ditq": equal content gives equal bytes."""
    with writing(path) as beside:
        save_file(dict(tensors), str(beside), metadata={"ditq": json.dumps(metadata, ensure_ascii=False)})


def make_folder(path: Path) -> None:
    """Make a folder and those above it, or raise a DitqError that names it."""
    with _disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder with all in it, or raise a DitqError that names it."""
    with _disk_errors(path):
        shutil.rmtree(path)


def rename(path: Path, to: Path) -> None:
    """Give a finished file or folder its name, or raise a DitqError that names it."""
    with _disk_errors(to):
        os.replace(path, to)


def tensor_digest(*tensors: torch.Tensor) -> str:
    """SHA-256 over the bytes of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor.cpu()).numpy().data)
    return digest.hexdigest()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        # safetensors hands on the operating system's error as text only
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in reason
        advice = "free some space, then go on with --resume" if full else "give a folder that can be written to"
        raise DitqError(f"{path}: cannot be written ({reason}); {advice}") from error
