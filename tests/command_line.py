"""The command line run in this process: exit code, what it printed, and what a refusal must look like."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from ditq.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run `ditq <arguments>` as the console script does."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, out, err)


def assert_refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: object) -> None:
    """The command fails as promised: exit code 2 and one line that starts with `error: ` and says `says` (a pattern)."""
    ran = run(capsys, *arguments)
    lines = [line for line in ran.err.splitlines() if line.strip()]
    assert ran.code == 2, ran
    assert len(lines) == 1 and lines[0].startswith("error: "), ran.err
    assert re.search(says, lines[0]), lines[0]
