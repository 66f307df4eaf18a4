"""`--budget` end to end: the engine keeps it, its recipe is plain and gives the same engine, and refusals are one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ditq
from ditq.budget import Budget
from ditq.compiler import CompileOptions
from ditq.errors import DitqError
from ditq.pass_pipeline import run_passes
from ditq.recipe import Recipe, load_recipe
from tests.command_line import assert_refused, run
from tests.small_checkpoint import files_below, write_pipeline, write_transformer

# In the place of an engine, whose export takes long.
UNWRITTEN = SimpleNamespace(manifest={"inputs": [], "dropped_axes": []}, files={"weights.safetensors": {"bytes": 0}})
PROMPTS = ["red apple, fluent 3d", "dog, noto"]


def quick() -> Recipe:
    """w4a8 rounded to nearest: coding every linear in every candidate is what takes the time here."""
    recipe = load_recipe("w4a8").to_json()
    recipe["passes"][-1]["quantize"] |= {"rounding": "nearest", "refine": 0}
    return Recipe.from_dict(recipe, "quick")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    file.write_text(yaml.safe_dump(quick().to_json()))
    return file


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("budget") / "pipeline")


@pytest.fixture(scope="module")
def stats(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics") / "stats"
    ditq.calibrate(pipeline, folder, PROMPTS, steps=2, progress=False)
    return folder


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditq.compiler.write_engine", lambda *_, **__: pytest.fail("reached the export"))


def name_of(spec: dict[str, Any]) -> str:
    of_groups = [
        shape
        for shape in (spec["scale"], spec["multiplier"])
        if shape is not None and shape[-1:] == [spec["in_features"] // 32]
    ]
    return f"w{spec['bits']}" + ("g32" if of_groups else "") + (f"r{spec['rank']}" if spec["rank"] else "")


def test_a_size_is_kept_and_the_written_recipe_alone_gives_the_same_engine(
    pipeline: Path, stats: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", pipeline, "--stats", stats, "--evaluate", 0]
    asked = ["--recipe", recipe, "--budget", "size=330KB", "--candidates", "w3,w4,w4g32,w4r6%,w8"]
    ran = run(capsys, *command, "-o", tmp_path / "engine", *asked)
    assert ran.code == 0, ran.err
    assert "measured over predicted" in ran.out and (tmp_path / "engine" / "budget.png").stat().st_size > 1000
    manifest = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert 270_000 < manifest["files"]["weights.safetensors"]["bytes"] <= 330_000
    report = manifest["reports"][0]
    assert report["pass"] == "budget" and report["settings"]["budget"] == "size=0.33MB"
    assert json.loads((tmp_path / "engine" / "budget.json").read_text())["front"] == report["front"]
    assert [point["chosen"] for point in report["front"]].count(True) == 1
    formats = {row["site"]: row["chosen"] for row in report["rows"]}
    quantized = manifest["structure"]["quantized"]
    assert {site: name_of(quantized[site]) for site in formats} == {
        site: name.replace("r6%", "r4") for site, name in formats.items()
    }
    assert formats.keys() == quantized.keys() and report["summary"]["errors are of"] == "the last latents"
    assert len(set(formats.values())) > 1 and any("r" in name for name in formats.values())
    fitted = tmp_path / "fitted.yaml"
    fitted.write_text(yaml.safe_dump(manifest["recipe"]))
    shown = run(capsys, "inspect", pipeline, "--recipe", fitted)
    assert shown.code == 0, shown.err
    # without a graph to trace, which is most of the time: the weights are what is compared
    assert run(capsys, *command, "-o", tmp_path / "again", "--recipe", fitted, "--target", "cuda").code == 0
    first, again = (load_file(tmp_path / name / "weights.safetensors") for name in ("engine", "again"))
    shared = first.keys() & again.keys()
    assert all(torch.equal(first[name], again[name]) for name in shared)
    assert {name for name in shared if "codes" in name} >= {f"{site}.codes" for site in formats}
    assert files_below(tmp_path) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["options", "recipe"])
def test_bits_a_weight_are_kept(
    pipeline: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("ditq.compiler.write_engine", lambda *_, **__: UNWRITTEN)
    recipe = quick()
    if where == "recipe":
        recipe = replace(recipe, budget=Budget.parse("bits=5"))
    options = CompileOptions(statistics=stats, budget="bits=5" if where == "options" else None, progress=False)
    result = ditq.compile(pipeline, tmp_path / "engine", recipe, options)
    assert result.recipe.budget is None  # what was chosen stands in its rules
    with pytest.raises(ValueError, match="has a budget"):
        run_passes(None, replace(recipe, budget=Budget.parse("bits=5")), None)  # type: ignore[arg-type]
    summary = {report.name: report.summary for report in result.reports}
    assert summary["quantize"]["bits a weight"] == pytest.approx(summary["budget"]["bits a weight"])
    assert 4.5 < summary["quantize"]["bits a weight"] <= 5


STRUCTURAL: dict[str, dict[str, Any]] = {
    "slim_modulation": {"rank": 8, "multiple": 8},
    "moe": {"experts": 4},
    "prune": {},
    "linear_attention": {},
    "token_order": {},
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_formats_are_chosen_for_what_structural_passes_have_made(
    pipeline: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("ditq.compiler.write_engine", lambda *_, **__: UNWRITTEN)
    made = quick().to_json()
    made["passes"].insert(0, {name: STRUCTURAL[name]})
    settings = made["passes"][-1]["quantize"]
    settings |= {"group_size": 0, "rules": [{**rule, "group_size": 0} for rule in settings["rules"]]}
    options = CompileOptions(statistics=stats, budget=Budget.parse("bits=5", "w4,w8"), progress=False)
    result = ditq.compile(pipeline, tmp_path / "engine", Recipe.from_dict(made, "made"), options)
    reports = {report.name: report for report in result.reports}
    assert 4 < reports["budget"].summary["bits a weight"] <= 5
    assert reports["quantize"].summary["bits a weight"] == pytest.approx(reports["budget"].summary["bits a weight"])
    assert {row["site"] for row in reports["budget"].rows} == {row["site"] for row in reports["quantize"].rows}
    assert len({row["chosen"] for row in reports["budget"].rows}) == 2
    assert reports["budget"].summary["errors are of"] == "the last latents"


def test_inspect_says_that_bits_are_still_to_be_chosen(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "inspect", pipeline, "--recipe", "w4a8-mixed")
    assert "recipe w4a8-mixed has the budget bits=4.3: `ditq compile` chooses the bits of each linear" in shown.out


def test_a_quality_is_measured_on_pictures_and_the_smallest_assignment_that_has_it_is_taken(
    pipeline: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.compiler.write_engine", lambda *_, **__: UNWRITTEN)
    asked = Budget.parse("psnr>=1", "w3,w8")
    result = ditq.compile(
        pipeline, tmp_path / "engine", quick(), CompileOptions(statistics=stats, budget=asked, progress=False)
    )
    points = result.reports[0].to_json()["front"]
    assert points[0]["chosen"] and points[0]["PSNR, dB"] >= 1  # 1 dB is what any picture has
    asked = Budget.parse("psnr>=99.9", "w3,w4")
    with pytest.raises(DitqError, match=r"not reached, the best with candidates w3, w4 is \d+\.\d dB"):
        ditq.compile(
            pipeline, tmp_path / "other", quick(), CompileOptions(statistics=stats, budget=asked, progress=False)
        )


def test_an_impossible_budget_names_the_smallest_possible_size(
    pipeline: Path, stats: Path, recipe: Path, tmp_path: Path, no_export: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", pipeline, "-o", tmp_path / "e", "--stats", stats, "--recipe", recipe, "--candidates", "w3,w4"]
    assert_refused(capsys, r"impossible, the smallest with candidates w3, w4 is size=0\.\d+MB", *command,
                   "--budget", "size=10KB")  # fmt: skip
    assert_refused(capsys, r"impossible, the smallest .* is bits=\d\.\d+", *command, "--budget", "bits=1")
    assert {name.partition("/")[0] for name in files_below(tmp_path)} == {".e.work"}  # what was rounded, for --resume


def test_too_few_calls_to_learn_on_are_refused_before_the_search(
    pipeline: Path,
    stats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ditq.compiler.fit_budget", lambda *_, **__: pytest.fail("searched"))
    recipe = tmp_path / "learned.yaml"
    recipe.write_text("passes: [quantize: {format: w4a8}, reconstruct: {batch: 512, samples: 1024}]\n")
    assert_refused(capsys, "all recorded calls fit one batch of 512", "compile", pipeline, "-o", tmp_path / "e", "--stats",
                   stats, "--recipe", recipe, "--budget", "bits=4")  # fmt: skip


def test_what_cannot_be_budgeted_is_refused_before_any_work(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.compiler._statistics", lambda *_: pytest.fail("work was done"))
    out = ["-o", tmp_path / "e"]
    assert_refused(capsys, "budget 'size=4': a size needs a unit", "compile", pipeline, *out, "--budget", "size=4")
    assert_refused(
        capsys, "--candidates says what --budget chooses", "compile", pipeline, *out, "--candidates", "w3,w4"
    )
    rotate = tmp_path / "rotate.yaml"
    rotate.write_text("passes: [smooth]\n")
    assert_refused(capsys, "no pass 'quantize'; a budget needs", "compile", pipeline, *out, "--recipe", rotate,
                   "--budget", "bits=4")  # fmt: skip
    assert_refused(capsys, "candidate w4g40: .*: groups of 40 do not divide its", "compile", pipeline, *out, "--budget",
                   "bits=4", "--candidates", "w2,w4g40")  # fmt: skip
    alone = write_transformer(tmp_path / "alone", torch.float32)
    assert_refused(capsys, "transformer alone cannot draw", "compile", alone, *out, "--budget", "psnr>=20")


def test_statistics_without_trajectories_are_refused(
    pipeline: Path, stats: Path, tmp_path: Path, no_export: None
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("statistics.json", "statistics.safetensors"):
        (bare / name).write_bytes((stats / name).read_bytes())
    with pytest.raises(DitqError, match=r"no recorded trajectories here .*ditq calibrate"):
        ditq.compile(pipeline, tmp_path / "e", "w4a8", CompileOptions(statistics=bare, budget="bits=4"))
