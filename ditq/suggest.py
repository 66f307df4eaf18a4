"""Say what a mistyped word probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_key(where: str, key: object, known: Iterable[str]) -> str:
    """`where: unknown 'mod'; did you mean 'mode'?`, or the list of what is known."""
    names = list(known)
    close = get_close_matches(str(key), names, n=1)
    return f"{where}: unknown {key!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}")
