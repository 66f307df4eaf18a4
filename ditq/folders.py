"""Where output goes: checked before any work is done, made beside its place, and nothing left behind where the work fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditq.errors import DitqError, Interrupted


def check_output(path: Path, force: bool) -> None:
    """Raise DitqError, before any work is done, if `path` is taken and not to be replaced, or cannot be written."""
    if path.exists() and not force:
        raise DitqError(f"{path}: exists already; give --force to replace it, or another name")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DitqError(f"{path}: cannot be written, {parent} is not a folder that you may write to")


@contextmanager
def without_new_parents(path: Path) -> Iterator[None]:
    """Folders above `path` that the block made are removed again when it raises and they are empty."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first that is missing still, or that holds something
            for folder in missing:
                folder.rmdir()
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def work_folder(out: Path, resume: bool) -> Iterator[Path]:
    """Where finished parts are kept while an engine is made: `.NAME.work` beside it, made when something is put there.

    An interruption keeps it for `--resume`. Success and errors remove it, except that an error in a resumed compile
    leaves what the interrupted one had, so that a mistyped option does not cost the work of hours.
    """
    work = out.absolute().parent / f".{out.name}.work"
    if work.exists() and not resume:
        remove(work)
    resumed = work.exists()
    with without_new_parents(out):
        try:
            yield work
        except KeyboardInterrupt as error:
            if not any(work.rglob("*.safetensors")):  # nothing finished yet
                shutil.rmtree(work, ignore_errors=True)
                raise
            raise Interrupted(
                f"interrupted; run again with --resume to go on (finished parts are in {work})"
            ) from error
        except BaseException:
            if not resumed:
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
