"""Where output goes: checked before any work is done, made beside its place, and nothing left behind where the work fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ditq.errors import DitqError, Interrupted
from ditq.given import check_named
from ditq.locks import locked


def check_output(path: Path, force: bool) -> None:
    """Raise DitqError, before any work is done, if `path` is taken and not to be replaced, or cannot be written."""
    check_named("the output", path)
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


_LOCK = "lock"  # in a work folder: whose it is, and that somebody is at it


@contextmanager
def work_folder(out: Path, resume: bool) -> Iterator[Path]:
    """A folder `.NAME.work` beside `out` where finished parts are kept while an engine is made; one process has it at a time.

    Success removes it. An interruption or an error keeps it for `--resume` where something is finished, and says so.

    Raises:
        DitqError: another process is at it, or it is not a folder of this kind.
    """
    work = out.absolute().parent / f".{out.name}.work"
    with without_new_parents(out), _locked(work, out):
        if not resume:
            _clear(work)
        try:
            yield work
        except BaseException as error:
            if not any(work.rglob("*.safetensors")):  # nothing finished yet
                shutil.rmtree(work, ignore_errors=True)
                raise
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(
                    f"interrupted; run again with --resume to go on (finished parts are in {work})"
                ) from error
            if isinstance(error, DitqError) and not isinstance(error, Interrupted) and "--resume" not in str(error):
                raise DitqError(f"{error}; finished parts are in {work}: --resume goes on with them") from error
            raise
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """The folder, made if it is not there, with a lock in it."""
    if os.path.lexists(work) and not (work.is_dir() and ((work / _LOCK).is_file() or not any(work.iterdir()))):
        raise DitqError(f"{work}: was not made by ditq, which keeps there what is finished; move it elsewhere")
    with locked(work / _LOCK, out):
        yield


def _clear(work: Path) -> None:
    """Remove what an earlier process left."""
    for found in work.iterdir():
        if found.name != _LOCK:
            remove(found)
