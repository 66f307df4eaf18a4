"""One process at a time makes an output: a lock that its process loses however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ditq.errors import DitqError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


RETRIES = 100  # of a file that goes while it is opened, as when its process has just finished


@contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Hold the lock of the file `path` while the block runs, which makes `out`; the file and the folders above it are made.

    The block may remove the file. Where a file system has no locks, everybody has it.

    Raises:
        DitqError: another process has it, the file cannot be made, or a file of that name is somebody else's.
    """
    for _ in range(RETRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DitqError(f"{path.parent}: cannot be written ({error.strerror}); give another place") from error
        try:
            file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)), "rb")
        except FileNotFoundError:  # its folder has just been removed with it
            time.sleep(0.01)
            continue
        except OSError as error:
            raise DitqError(f"{path}: cannot be written ({error.strerror}); give another place") from error
        with file:
            if os.fstat(file.fileno()).st_size:
                raise DitqError(f"{path}: was not made by ditq, whose locks are empty; move it elsewhere")
            if not _taken(file):
                raise DitqError(f"{out}: another process is making it; wait for that, or give another name")
            if _still_there(file, path):
                yield
                return
    raise DitqError(f"{path.parent}: cannot be written (no file can be made in it); give another place")


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
