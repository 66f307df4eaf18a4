"""What a program gives a function: of the kind that the function takes, or one line says what it should have been."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ditq.errors import DitqError

MOST_SEED = 2**62  # seed + number of the prompt must fit 64 bits


def path_of(what: str, value: Any) -> Path:
    """The path of that argument.

    Raises:
        DitqError: no path, an empty one, or one that is not UTF-8, by which neither safetensors nor ONNX Runtime opens a file.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise DitqError(f"{what} is a {type(value).__name__}; give a path")
    if not os.fspath(value):
        raise DitqError(f"{what} is ''; give a path")
    try:
        os.fspath(value).encode()
    except UnicodeEncodeError as error:
        raise DitqError(
            f"{os.fspath(value)!a}: this path is not UTF-8, so its files cannot be opened; rename it"
        ) from error
    return Path(value)


def followed(path: Path) -> Path:
    """What a symbolic link stands for, so that it is this that is replaced; any other path as it is."""
    return path.resolve() if path.is_symlink() else path


def check_named(what: str, path: Path) -> None:
    """Raise DitqError for a place that cannot be made anew beside itself and then renamed: `.`, `..`, the root."""
    if path.name in ("", ".."):
        raise DitqError(f"{what} is {str(path)!r}; give the name of a folder to make")


def name_of(path: str | Path) -> str:
    """Its last part, of `.` and `..` that of the folder they stand for."""
    return Path(os.path.abspath(path)).name


def check_whole(what: str, value: Any, least: int, most: int | None = None, needed: bool = False) -> None:
    """Raise DitqError unless it is a whole number within these, or None where that leaves it to the function."""
    if value is None and not needed:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        upto = f" of at least {least}" if most is None else f" from {least} to {most}"
        raise DitqError(f"{what} is {value!r}; give a whole number{upto}")


def check_seed(seed: Any) -> None:
    """Raise DitqError unless it is a seed from which every prompt's can be counted."""
    check_whole("seed", seed, 0, MOST_SEED, needed=True)
