"""What compiled code prints does not reach the user."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from ditq.quiet import quiet_compiled_code


@pytest.mark.skipif(sys.platform != "linux", reason="finds the C library as on Linux")
def test_what_compiled_code_prints_goes_nowhere_and_what_surrounds_it_stays(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    print("before")
    with pytest.raises(KeyError), quiet_compiled_code():
        library.puts(b"of the solver")  # into the C library's own buffer
        os.write(1, b"of the solver")
        raise KeyError
    library.puts(b"later")
    library.fflush(None)
    print("after", flush=True)
    out = capfd.readouterr().out
    assert "of the solver" not in out and {"before", "later", "after"} <= set(out.split())


def test_it_does_without_a_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: int) -> int:
        raise OSError("no such descriptor")

    monkeypatch.setattr(os, "dup", closed)
    with quiet_compiled_code():
        pass
