"""The parts that answer for the attentions of the block that runs: how an operator, the same in all blocks, finds its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_asked: ContextVar[Sequence[Any]] = ContextVar("the parts of the block that runs", default=())


@contextmanager
def answering(parts: Sequence[Any]) -> Iterator[None]:
    """Let these parts, each by its place among them, answer for the attentions that are computed meanwhile."""
    before = _asked.set(parts)
    try:
        yield
    finally:
        _asked.reset(before)


def asked() -> Sequence[Any]:
    """Those that are answering now."""
    return _asked.get()
