"""Output folders appear whole or not at all: written beside, then renamed; old ones are replaced only when asked."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditq.errors import DitqError


def check_output(path: Path, force: bool) -> None:
    """Raise DitqError, before any work is done, if `path` is taken and not to be replaced, or cannot be written."""
    if path.exists() and not force:
        raise DitqError(f"{path}: exists already; give --force to replace it, or another name")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DitqError(f"{path}: cannot be written, {parent} is not a folder that you may write to")


@contextmanager
def whole_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    check_output(path, force)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent))
    partial.chmod(0o755)
    try:
        yield partial
        if path.exists():
            remove(path)
        partial.rename(path)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
