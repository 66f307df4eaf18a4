"""Sound checkpoints, and what tests do to copies of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.small_checkpoint import write_pipeline, write_transformer

Damage = Callable[[Path], Any]


def sound_checkpoints(root: Path) -> dict[str, Path]:
    """Checkpoints as they should be, by what they are: `one` file, `shards`, a `pipeline`."""
    return {
        "one": write_transformer(root / "one"),
        "shards": write_transformer(root / "shards", shards=True),
        "pipeline": write_pipeline(root / "pipeline"),
    }


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


class Marker:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.mkdir, (self.path,))
