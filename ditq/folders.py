"""Check where output goes before any work is done."""

from __future__ import annotations

import os
import shutil
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


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
