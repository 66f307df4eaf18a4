"""Progress is shown on a terminal, silent elsewhere, and can be handed to a callback."""

from __future__ import annotations

import pytest

from ditq import progress
from ditq.progress import progress_bar


def test_a_callback_hears_the_start_and_every_advance_and_never_beyond_the_total() -> None:
    heard: list[tuple[str, int, int]] = []
    with progress_bar("work", 3, lambda *news: heard.append(news)) as bar:
        bar.advance()
        bar.advance_to(1)
        bar.advance(5)
        bar.advance()
    assert heard == [("work", 0, 3), ("work", 1, 3), ("work", 3, 3)]


def test_without_a_terminal_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work", 2) as bar:
        bar.advance(2)
    assert capfd.readouterr() == ("", "")


def test_bars_nest_and_go_away_also_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar("outer", 2, True) as outer:
        with progress_bar("inner", 2, True) as inner:
            inner.advance()
        outer.advance()
        raise KeyboardInterrupt
    assert not progress._live
    assert capfd.readouterr().out == ""
