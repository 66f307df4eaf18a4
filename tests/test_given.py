"""Mistakes of a program are a DitqError of one line, before anything is read or computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ditq
from ditq.budget import Budget
from ditq.errors import DitqError
from ditq.export import float64_agreement, site_agreement
from ditq.given import name_of
from tests.command_line import assert_refused

NOT_UTF8 = os.fsdecode(b"/tmp/\xff")


def compile_with(**options: Any) -> None:
    ditq.compile("mini", "/no/such/place", options=ditq.CompileOptions(**options))


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "half a thread": (lambda: ditq.load_engine("e", threads=2.5), "^threads is 2.5; give a whole number from 1 to 1024$"),  # type: ignore[arg-type]
    "threads as text": (lambda: ditq.load_engine("e", threads="2"), "^threads is '2'; give a whole number"),  # type: ignore[arg-type]
    "no thread": (lambda: ditq.load_engine("e", threads=0), "^threads is 0; give a whole number from 1 to 1024$"),
    "fewer threads": (lambda: ditq.load_engine("e", threads=-1), "^threads is -1; "),
    "engine None": (lambda: ditq.load_engine(None), "^engine is a NoneType; give a path$"),  # type: ignore[arg-type]
    "engine bytes": (lambda: ditq.load_engine(b"e"), "^engine is a bytes; give a path$"),  # type: ignore[arg-type]
    "engine empty": (lambda: ditq.load_engine(""), "^engine is ''; give a path$"),
    "engine not UTF-8": (lambda: ditq.load_engine(NOT_UTF8), r"^'/tmp/\\udcff': this path is not UTF-8, .*; rename it$"),
    "out not UTF-8": (lambda: ditq.compile("mini", NOT_UTF8), "this path is not UTF-8"),
    "out None": (lambda: ditq.compile("mini", None), "^out is a NoneType; give a path$"),  # type: ignore[arg-type]
    "checkpoint a model": (lambda: ditq.compile(nn.Linear(2, 2), "e"), "^checkpoint is a Linear; give a path$"),  # type: ignore[arg-type]
    "checkpoint empty": (lambda: ditq.Checkpoint.open(""), "^checkpoint is ''; give a path$"),
    "evaluate": (lambda: ditq.evaluate("no such engine", "mini"), "^no such engine: no such engine folder$"),
    "evaluate limit": (lambda: ditq.evaluate("e", "mini", limit=0), "^limit is 0; give a whole number of at least 1$"),
    "calibrate limit": (lambda: ditq.calibrate("mini", "s", limit=0), "^limit is 0; give a whole number of at least 1$"),
    "calibrate bins": (lambda: ditq.calibrate("mini", "s", bins=1.5), "^bins is 1.5; give a whole number"),  # type: ignore[arg-type]
    "options a dict": (lambda: ditq.compile("mini", "e", options={"limit": 1}), r"^options is a dict; give ditq\.Comp"),  # type: ignore[arg-type]
    "options None": (lambda: ditq.compile("mini", "e", options=None), "^options is a NoneType; give ditq"),  # type: ignore[arg-type]
    "limit as text": (lambda: compile_with(limit="4"), "^limit is '4'; give a whole number of at least 1$"),
    "limit 0": (lambda: compile_with(limit=0), "^limit is 0; "),
    "seed as text": (lambda: compile_with(seed="0"), "^seed is '0'; give a whole number from 0 to "),
    "seed too large": (lambda: compile_with(seed=2**64), "^seed is 18446744073709551616; give a whole number from 0 to"),
    "seed true": (lambda: compile_with(seed=True), "^seed is True; "),
    "budget a number": (lambda: compile_with(budget=3.5), "^budget is 3.5; write it as a word, such as 'size=4.2MB'"),
    "budget of no kind": (lambda: Budget("nope", 1.0), "^budget: unknown 'nope'"),  # type: ignore[arg-type]
    "budget of nothing": (lambda: Budget("size", 0), "^budget size: is 0; give a number above 0$"),
    "budget without a choice": (lambda: Budget("size", 4e6, ()), "nothing to choose between"),
    "device None": (lambda: compile_with(device=None), "^device is None; give cpu, cuda"),
    "statistics a number": (lambda: compile_with(statistics=3), "^statistics is a int; give a path$"),
    "target a list": (lambda: compile_with(target=[]), r"^target '\[\]' is not known"),
    "gpus a number": (lambda: compile_with(target="tensorrt", gpus=3), "^gpus is 3; give kinds of GPU"),
    "gpus numbers": (lambda: compile_with(target="tensorrt", gpus=[3]), r"^gpus is \[3\]; give kinds of GPU"),
    "sizes a number": (lambda: compile_with(target="tensorrt", sizes=3), "^sizes is 3; give a word"),
    "bins None": (lambda: ditq.calibrate("mini", "s", bins=None), "^bins is None; give a whole number"),  # type: ignore[arg-type]
    "moments": (lambda: ditq.calibrate("mini", "s", moments="x"), "^moments: unknown 'x'"),
    "memory as text": (lambda: ditq.calibrate("mini", "s", memory_limit="1GB"), "^memory_limit is '1GB'; give"),  # type: ignore[arg-type]
    "arguments a word": (lambda: ditq.calibrate("mini", "s", arguments="x"), "^arguments is 'x'; give a dictionary"),  # type: ignore[arg-type]
    "arguments by number": (lambda: ditq.calibrate("mini", "s", arguments={1: 2}), "^arguments is .*; give a dict"),  # type: ignore[dict-item]
    "conditions a number": (lambda: ditq.calibrate("mini", "s", 3), "^conditions is 3; give a list"),  # type: ignore[arg-type]
    "many threads": (lambda: ditq.load_engine("e", threads=10**9), "^threads is 1000000000; give a whole number from 1"),
    "agreement of a path": (lambda: site_agreement("e", {}), r"^engine is a str; give Engine\.open"),  # type: ignore[arg-type]
    "float64 of a path": (lambda: float64_agreement("e", {}), r"^engine is a str; give Engine\.open"),  # type: ignore[arg-type]
    "form a number": (lambda: ditq.evaluate(nn.Linear(2, 2), "mini", quantized=3), "^quantized is a int; give the"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_mistake_of_a_program_is_one_line(case: str) -> None:
    call, says = CALLS[case]
    with pytest.raises(DitqError, match=says):
        call()


def test_a_path_that_is_not_utf8_is_one_line_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("doctor", NOT_UTF8), ("inspect", NOT_UTF8), ("compile", "mini", "-o", NOT_UTF8)):
        assert_refused(capsys, r"'/tmp/\\udcff': this path is not UTF-8", *command)


def test_a_dot_has_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert (name_of("."), name_of(".."), name_of("./below/"), name_of("mini")) == (
        "here",
        tmp_path.name,
        "below",
        "mini",
    )
    assert_refused(capsys, r"^error: \.: no config.json in here/; give", "inspect", ".")
