"""Bad prompts, statistics and places to write: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import ditq
from ditq.checkpoint import Checkpoint
from ditq.compiler import CompileOptions
from ditq.errors import DitqError
from tests.command_line import assert_refused
from tests.damage import Damage, Marker, cut, sound_checkpoints
from tests.small_checkpoint import (
    change_weights,
    files_below,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sound_checkpoints(tmp_path_factory.mktemp("sound"))


# --- prompts

PROMPTS = {
    "none": (b"", "no prompts"),
    "only a heading": (b"prompt\n", "no prompts"),
    "an empty line": (b"a cat\n\na dog\n", "line 2 is empty"),
    "a blank line": (b"a cat\n   \n", "line 2 is empty"),
    "10,001 characters": (b"a cat\n" + b"x" * 10_001 + b"\n", "line 2 has 10,001 characters"),
    "not UTF-8": (b"a cat\ncaf\xe9\n", "line 2 is not UTF-8"),
    "gone": (None, "prompts.txt: cannot be read .*; give a file of prompts"),
    "another kind of file": (b"a cat\n", "prompts are read from .txt, .csv, .jsonl files, not '.docx'"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_bad_prompts_are_one_line_before_any_drawing(
    case: str,
    sound: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, says = PROMPTS[case]
    ending = {"only a heading": ".csv", "another kind of file": ".docx"}.get(case, ".txt")
    path = tmp_path / f"prompts{ending}"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("ditq.calibration.record.sample_one", lambda *_, **__: pytest.fail("drew something"))
    before = files_below(tmp_path)
    for command in ("compile", "calibrate"):
        assert_refused(capsys, says, command, sound["pipeline"], "-o", tmp_path / "new" / "out", "--prompts", path)
    with pytest.raises(DitqError, match=says):
        ditq.compile(sound["pipeline"], tmp_path / "out", options=CompileOptions(conditions=path))
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "no prompts"),
        ([""], "prompt 0 is empty"),
        (["x" * 10_001], "10,001 characters"),
        ([7], "takes text prompts"),
    ],
)
def test_bad_prompts_from_a_program_are_a_ditq_error(
    prompts: list[Any], says: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DitqError, match=says):
        ditq.compile(sound["pipeline"], tmp_path / "engine", options=CompileOptions(conditions=prompts))
    assert files_below(tmp_path) == []


# --- statistics of something else, or damaged


@pytest.fixture(scope="module")
def statistics(sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "stats"
    ditq.calibrate(sound["pipeline"], out, ["dog, noto"], steps=1, bins=1, progress=False)
    return out


def _edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def _tensor_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _change_a_number(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if (found := tensors.get("transformer_blocks.0.attn.to_q.total")) is not None:
            found.view(-1)[3] += 1
            save_file(tensors, path)


def _pickled_file(folder: Path) -> None:
    _tensor_file(folder).write_bytes(pickle.dumps(Marker(folder.parent / "was-run")))


def _leave_out_a_group(index: dict[str, Any]) -> None:
    del index["groups"]["transformer_blocks.0.attn.to_q"]


STATISTICS: dict[str, tuple[Damage, str]] = {
    "gone": (shutil.rmtree, "not a statistics folder"),
    "no index": (lambda f: (f / "statistics.json").unlink(), "not a statistics folder"),
    "index not JSON": (lambda f: (f / "statistics.json").write_text("{"), "not valid JSON"),
    "index of something else": (lambda f: (f / "statistics.json").write_text("{}"), "not written by ditq"),
    "later format": (_edit_json("statistics.json", lambda i: i.update(version=9)), "has format version 9"),
    "index incomplete": (_edit_json("statistics.json", lambda i: i.pop("bins")), "damaged or incomplete"),
    "an input missing": (_edit_json("statistics.json", _leave_out_a_group), "do not hold the input of transformer_blocks.0"),
    "tensors gone": (lambda f: _tensor_file(f).unlink(), "missing, truncated or damaged"),
    "tensors truncated": (lambda f: cut(_tensor_file(f), 5000), "missing, truncated or damaged"),
    "tensors pickled": (_pickled_file, "missing, truncated or damaged"),
    "a number changed": (_change_a_number, "were changed or damaged"),
    "outside": (
        _edit_json("statistics.json", lambda i: [g.update(file="../x.safetensors") for g in i["groups"].values()]),
        "outside the folder",
    ),
    "of another checkpoint": (
        _edit_json("statistics.json", lambda i: i["checkpoint"].update(fingerprint="0" * 64)),
        "are of another checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_do_not_belong_here_are_one_line(
    case: str, sound: dict[str, Path], statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage, says = STATISTICS[case]
    folder = shutil.copytree(statistics, tmp_path / "stats")
    damage(folder)
    before = files_below(tmp_path)
    monkeypatch.setattr("ditq.compiler.write_engine", lambda *_, **__: pytest.fail("reached the export"))
    assert_refused(capsys, says, "compile", sound["one"], "-o", tmp_path / "engine", "--stats", folder)
    assert files_below(tmp_path) == before


def test_statistics_of_other_weights_are_refused(
    sound: dict[str, Path], statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(sound["one"], tmp_path / "other")
    change_weights(other, lambda tensors: tensors["proj_out.bias"].add_(1))
    assert_refused(capsys, "another checkpoint", "compile", other, "-o", tmp_path / "e", "--stats", statistics)
    ditq.compiler.Statistics.open(statistics, Checkpoint.open(sound["one"]).fingerprint())  # the right ones are taken


def test_a_full_disk_while_saving_a_picture_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Picture:
        def save(self, path: Path, format: str) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("ditq.report.engine_report.draw", lambda *_, **__: Picture())
    assert_refused(capsys, "No space left on device; free some space", "sample", "e", "a cat", "-o", tmp_path / "p.png")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [("taken.png", "exists already; give --force"), ("p.docx", "pictures are written as"), ("d", "exists")],
)
def test_the_pictures_place_is_checked_before_drawing(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.report.engine_report.draw", lambda *_, **__: pytest.fail("drew something"))
    (tmp_path / "taken.png").write_bytes(b"mine")
    (tmp_path / "d").mkdir()
    assert_refused(capsys, says, "sample", "e", "a cat", "-o", tmp_path / name)
    assert_refused(capsys, "is a folder", "sample", "e", "a cat", "-o", tmp_path / "d", "--force")
    assert (tmp_path / "taken.png").read_bytes() == b"mine"
