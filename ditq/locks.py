"""One process at a time makes an output: a lock that its process loses however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ditq.errors import DitqError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Hold the lock of the file `path` while the block runs, which makes `out`; the file and the folders above it are made.

    The block may remove the file. Where a file system has no locks, everybody has it.

    Raises:
        DitqError: another process has it, or the file cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _opened(path)
        except OSError as error:
            raise DitqError(f"{path.parent}: cannot be written ({error.strerror}); give another place") from error
        if file is None:  # whose it was has just removed it
            continue
        with file:
            if not _taken(file):
                raise DitqError(f"{out}: another process is making it; wait for that, or give another name")
            if _still_there(file, path):
                yield
                return


def _opened(path: Path) -> IO[bytes] | None:
    """The file, made if it is not there; None where its folder has gone."""
    try:
        return open(path, "ab")
    except FileNotFoundError:
        return None


def _still_there(file: IO[bytes], path: Path) -> bool:
    """Whether it is the file of that name, and not one that was removed while this process waited for its lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _taken(file: IO[bytes]) -> bool:
    """Whether this process has the file's lock now; where a system has no locks, it does."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
