"""Where engines and reports go: links are followed, places looked at first, and nothing written that is no number."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import ditq
from ditq.compiler import CompileOptions
from ditq.graph import DiTGraph
from ditq.recipe import Recipe
from ditq.report import engine_report
from tests.command_line import assert_refused
from tests.small_checkpoint import write_pipeline

OPTIONS = CompileOptions(conditions=["dog, noto"], steps=1, force=True, progress=False)


def quick(bits: int) -> Recipe:
    settings = {"format": f"w{bits}a16", "rounding": "nearest", "codebook": "uniform", "weighted": False}
    return Recipe.from_dict({"passes": [{"quantize": settings}]}, "quick")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("output") / "pipeline")


@pytest.fixture(scope="module")
def engine(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("output") / "engine"
    ditq.compile(pipeline, out, quick(8), OPTIONS)
    return out


def test_a_forced_compile_replaces_what_a_link_stands_for(engine: Path, pipeline: Path) -> None:
    def digest() -> str:
        return hashlib.sha256((engine / "weights.safetensors").read_bytes()).hexdigest()

    link, before = engine.with_name("link"), digest()
    link.symlink_to(engine)
    ditq.compile(pipeline, link, quick(4), OPTIONS)
    assert link.is_symlink() and digest() != before
    assert {path.name for path in engine.parent.iterdir()} == {"link", "engine"}


def test_the_place_of_a_report_is_looked_at_before_anything_is_drawn(
    engine: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_report, "evaluate", lambda *_, **__: pytest.fail("drew something"))
    (tmp_path / "taken").write_text("mine")
    command = ["evaluate", engine, "--against", pipeline, "--out", tmp_path / "taken"]
    assert_refused(capsys, "report.html: cannot be written, .*taken is not a folder", *command)


def test_a_number_that_a_pass_spoiled_is_not_written(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(graph: DiTGraph, *_: Any, **__: Any) -> list[Any]:
        next(graph.model.parameters()).data.fill_(float("nan"))
        return []

    monkeypatch.setattr("ditq.compiler.run_passes", spoil)
    command = ["compile", pipeline, "-o", tmp_path / "e", "--limit", 1, "--steps", 1, "--evaluate", 0]
    assert_refused(capsys, r"is not finite after the passes; .*finished parts are in", *command)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_place_without_a_name_is_refused_before_any_work(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    says = r"the output is '.*'; give the name of a folder to make"
    assert_refused(capsys, says, "compile", "mini", "-o", place, "--force")
