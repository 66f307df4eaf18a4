"""A progress bar with time left for long work: shown on a terminal, silent elsewhere, or handed to a callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ProgressCallback = Callable[[str, int, int], None]
"""Called with (description, units done, units in all): once at the start, then after every advance."""

ProgressSetting = bool | ProgressCallback | None
"""None = a bar when stderr is a terminal; True or False = force it on or off; a callable = call that instead."""

_live: list[Progress] = []  # the display now on screen: an inner bar becomes a further line of it


class ProgressBar:
    """One piece of work of `total` units; `done` is how many of them are finished. This base class shows nothing."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0

    def advance(self, n: int = 1) -> None:
        """Count `n` more units as done (never beyond `total`)."""
        done = min(self.done + n, self.total)
        if done != self.done:
            self.done = done
            self._show()

    def advance_to(self, done: int) -> None:
        """Count at least `done` units as done."""
        self.advance(max(0, done - self.done))

    def _show(self) -> None:
        pass


class _CallbackBar(ProgressBar):
    def __init__(self, description: str, total: int, callback: ProgressCallback) -> None:
        super().__init__(total)
        self._description = description
        self._callback = callback
        self._show()

    def _show(self) -> None:
        self._callback(self._description, self.done, self.total)


class _RichBar(ProgressBar):
    def __init__(self, display: Progress, task: TaskID, total: int) -> None:
        super().__init__(total)
        self._display = display
        self._task = task

    def _show(self) -> None:
        self._display.update(self._task, completed=self.done)


@contextmanager
def progress_bar(description: str, total: int, enabled: ProgressSetting = None) -> Iterator[ProgressBar]:
    """Show the progress of `total` units of work while the block runs; bars may be nested.

    `enabled`: None shows a bar on stderr when that is a terminal, a bool forces it on or off, a callable gets
    (description, done, total) instead. The bar goes away at the end, also when the block raises.
    """
    if callable(enabled):
        yield _CallbackBar(description, total, enabled)
    elif enabled is False or (enabled is None and not sys.stderr.isatty()):
        yield ProgressBar(total)
    elif _live:
        display = _live[-1]
        task = display.add_task(description, total=total)
        try:
            yield _RichBar(display, task, total)
        finally:
            display.remove_task(task)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        display = Progress(
            *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True
        )
        with display:
            _live.append(display)
            try:
                yield _RichBar(display, display.add_task(description, total=total), total)
            finally:
                _live.remove(display)
