"""Where work is kept: one process at a time, nothing of others removed, and what is finished kept after an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from ditq import locks
from ditq.errors import DitqError, Interrupted
from ditq.folders import work_folder
from ditq.given import followed
from ditq.locks import locked
from tests.command_line import assert_refused
from tests.small_checkpoint import files_below


def test_what_is_finished_is_kept_for_resume_and_said(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with (
        pytest.raises(
            DitqError, match=r"^no room; finished parts are in .*\.engine\.work: --resume goes on with them$"
        ),
        work_folder(out, resume=False) as work,
    ):
        (work / "a.safetensors").write_bytes(b"a")
        raise DitqError("no room")
    with pytest.raises(DitqError, match=r"^free some space, then go on with --resume$"), work_folder(out, True) as work:
        assert (work / "a.safetensors").read_bytes() == b"a"
        raise DitqError("free some space, then go on with --resume")
    with pytest.raises(Interrupted, match=r"--resume"), work_folder(out, True):
        raise KeyboardInterrupt
    with work_folder(out, resume=False) as work:  # a new start
        assert files_below(work) == ["lock"]
    assert files_below(tmp_path) == []


def test_an_error_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    for error in (DitqError("bad"), KeyboardInterrupt(), LookupError()):
        with pytest.raises(type(error)), work_folder(tmp_path / "a" / "engine", resume=False) as work:
            (work / "sites").mkdir()
            raise error
        assert files_below(tmp_path) == []


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with work_folder(out, resume=False) as work:
        (work / "a.safetensors").write_bytes(b"a")
        for resume in (False, True):
            with pytest.raises(DitqError, match="another process is making it; wait"), work_folder(out, resume):
                pass
        assert files_below(work) == ["a.safetensors", "lock"]
    killed = (
        "import os, pathlib, signal, sys; from ditq.folders import work_folder\n"
        "with work_folder(pathlib.Path(sys.argv[1]), False) as work:\n"
        "    (work / 'b.safetensors').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", killed, str(out)], check=False)
    with work_folder(out, resume=True) as work:
        assert files_below(work) == ["b.safetensors", "lock"]


@pytest.mark.parametrize("name", [".engine.work", ".engine.work/mine.txt"])
def test_what_is_not_ditqs_is_left_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert_refused(capsys, "was not made by ditq", "compile", "mini", "-o", tmp_path / "engine")
    assert mine.read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="writes below /proc, where nobody can")
def test_a_place_where_no_folder_can_be_made_is_one_line() -> None:
    with pytest.raises(DitqError, match=r"cannot be written \(.*\); give another place"):  # noqa: SIM117
        with work_folder(Path("/proc/nothing/engine"), resume=False):
            pass


def test_a_link_stands_for_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert followed(tmp_path / "link") == tmp_path.resolve() / "there"
    assert followed(tmp_path / "link" / "x") == tmp_path / "link" / "x"


def test_a_lock_that_cannot_be_made_or_is_not_ditqs_is_one_line(tmp_path: Path) -> None:
    mine, folder, link = tmp_path / "mine", tmp_path / "folder", tmp_path / "link"
    mine.write_text("precious")
    folder.mkdir()
    link.symlink_to("/nowhere/lock")
    for path, says in (
        (mine, r"/mine: was not made by ditq, whose locks are empty; move it elsewhere"),
        (folder, r"/folder: cannot be written \(.*\); give another place"),
        (link, r"/link: cannot be written \(.*\); give another place"),
        (mine / "lock", r"/mine: cannot be written \(.*\); give another place"),
        (Path("/proc/lock"), r"^/proc(/lock)?: cannot be written \(.*\); give another place"),
    ):
        with pytest.raises(DitqError, match=says), locked(path, tmp_path / "out"):
            pass
    assert mine.read_text() == "precious"


@pytest.mark.skipif(sys.platform == "win32", reason="locks as Unix has them")
def test_a_lock_on_a_file_that_has_gone_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tries = tmp_path / "lock", []

    def taken(file: IO[bytes]) -> bool:
        tries.append(file)
        if len(tries) == 1:  # whose it was has removed it between our opening and locking it
            path.unlink()
        return True

    monkeypatch.setattr(locks, "_taken", taken)
    with locked(path, tmp_path / "out"):
        assert len(tries) == 2 and path.exists()
