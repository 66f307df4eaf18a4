"""Compiling: the engine appears whole or not at all, and an interrupted compile resumes to the very same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import ditq
from ditq.calibration import record
from ditq.checkpoint import Checkpoint
from ditq.compiler import CompileOptions, _note_fixed
from ditq.errors import DitqError, Interrupted
from ditq.export import Engine
from ditq.passes import quantize
from ditq.report import engine_report, speed
from tests.calibration.small_pipelines import ARGUMENTS, CONDITIONS, saved_checkpoint
from tests.command_line import assert_refused, run
from tests.small_checkpoint import files_below, write_pipeline

PROMPTS = ["red apple, fluent 3d", "dog, noto"]
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("compile") / "pipeline")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "engine"
    ditq.compile(pipeline, out, "w4a8", CompileOptions(conditions=PROMPTS, steps=1, progress=False))
    return out


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes seconds; where it must not be reached it need not be run."""
    monkeypatch.setattr("ditq.compiler.write_engine", lambda *_, **__: pytest.fail("reached the export"))


def _digests(engine: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((engine / name).read_bytes()).hexdigest() for name in ("weights.safetensors", "model.onnx")
    }


def _on_call(number: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but its call of that number (from 1) raises `error`."""
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return function(*arguments, **keywords)

    return counted


def _patch(monkeypatch: pytest.MonkeyPatch, place: str, number: int, error: BaseException) -> None:
    module, _, name = place.rpartition(".")
    monkeypatch.setattr(place, _on_call(number, error, getattr(__import__(module, fromlist=[name]), name)))


def test_an_engine_appears_whole_with_nothing_beside_it(uninterrupted: Path) -> None:
    assert files_below(uninterrupted.parent) == [
        "engine", "engine/engine.json", "engine/model.onnx", "engine/weights.safetensors"
    ]  # fmt: skip
    manifest = json.loads((uninterrupted / "engine.json").read_text())
    assert manifest["recipe"]["name"] == "w4a8" and [r["pass"] for r in manifest["reports"]] == [
        "smooth",
        "rotate",
        "quantize",
    ]
    assert str(uninterrupted.parent) not in (uninterrupted / "engine.json").read_text()  # it can be moved


def test_a_compile_interrupted_twice_resumes_to_the_same_bytes(
    uninterrupted: Path, pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["compile", pipeline, "-o", tmp_path / "engine", "--prompts", prompts, "--steps", 1, "--evaluate", 0]
    again = [*command, "--resume"]
    with monkeypatch.context() as patched:  # in the middle of calibration, after the first prompt
        _patch(patched, "ditq.calibration.record.sample_one", 2, KeyboardInterrupt())
        assert_refused(capsys, "interrupted; run again with --resume", *command)
    assert not (tmp_path / "engine").exists() and (tmp_path / ".engine.work").is_dir()
    with monkeypatch.context() as patched:  # in the middle of the passes, after five linears
        _patch(patched, "ditq.passes.quantize.round_gptq", 6, KeyboardInterrupt())
        _patch(
            patched, "ditq.calibration.record.sample_one", 2, AssertionError("the first prompt was recorded already")
        )
        assert_refused(capsys, "interrupted; run again with --resume", *again)
    assert files_below(tmp_path)[0] == ".engine.work" and not (tmp_path / "engine").exists()
    with monkeypatch.context() as patched:  # to the end, now with the weights on disk
        patched.setattr("ditq.memory.SMALL", 1)
        rounded: list[int] = []
        gptq = quantize.round_gptq
        patched.setattr(quantize, "round_gptq", lambda *a, **k: rounded.append(1) or gptq(*a, **k))
        patched.setattr("ditq.calibration.record.sample_one", lambda *_, **__: pytest.fail("calibrated already"))
        ran = run(capsys, *again, "--offload", "disk")
    assert ran.code == 0 and "stood on disk" in ran.out, ran.err
    assert _digests(tmp_path / "engine") == _digests(uninterrupted)
    assert files_below(tmp_path) == files_below(uninterrupted.parent)  # the work folder is gone
    sites = json.loads((uninterrupted / "engine.json").read_text())["structure"]["quantized"]
    assert len(rounded) == len(sites) - 5


def test_an_interruption_before_anything_is_finished_leaves_nothing(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_export: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _patch(monkeypatch, "ditq.calibration.record.sample_one", 1, KeyboardInterrupt())
    assert_refused(capsys, "interrupted; nothing was left", "compile", pipeline, "-o", tmp_path / "a" / "engine")
    assert files_below(tmp_path) == []


def test_the_end_of_a_jobs_time_is_an_interruption(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_export: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM: after a prompt what is recorded is kept, and this process treats the signal as it did before."""
    before, calls = signal.getsignal(signal.SIGTERM), []
    sample_one = record.sample_one

    def ended(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return sample_one(*arguments, **keywords)

    monkeypatch.setattr(record, "sample_one", ended)
    command = ["calibrate", pipeline, "-o", tmp_path / "stats", "--steps", 1, "--limit", 3]
    assert_refused(capsys, "interrupted; run again with --resume", *command)
    assert files_below(tmp_path)[0] == "stats.partial" and signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_is_still_a_keyboard_interrupt_to_a_program(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_export: None
) -> None:
    _patch(monkeypatch, "ditq.calibration.record.sample_one", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="--resume") as caught:
        ditq.calibrate(pipeline, tmp_path / "stats", PROMPTS, steps=1)
    assert isinstance(caught.value, Interrupted) and files_below(tmp_path)[0] == "stats.partial"


def test_a_new_compile_without_resume_starts_again(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / ".engine.work" / "sites"
    work.mkdir(parents=True)
    (work / "old.safetensors").write_bytes(b"old")
    (work.parent / "lock").touch()

    def calibrate(*_: Any, **__: Any) -> None:
        raise LookupError("old work" if work.exists() else "clean")

    monkeypatch.setattr("ditq.compiler.calibrate", calibrate)
    with pytest.raises(LookupError, match="clean"):
        ditq.compile(pipeline, tmp_path / "engine")
    assert files_below(tmp_path) == []


def test_an_error_in_a_resumed_compile_keeps_what_was_finished(
    pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_export: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["compile", pipeline, "-o", tmp_path / "engine", "--steps", 1]
    with monkeypatch.context() as patched:
        _patch(patched, "ditq.calibration.record.sample_one", 2, KeyboardInterrupt())
        assert_refused(capsys, "--resume", *command, "--prompts", prompts)
    kept = files_below(tmp_path)
    assert_refused(capsys, "gone.txt: cannot be read", *command, "--resume", "--prompts", tmp_path / "gone.txt")
    assert_refused(capsys, "recorded with other conditions", *command, "--resume", "--limit", 1)
    assert files_below(tmp_path) == kept


FAILURES = {
    "full while recording": ("ditq.calibration.storage.save_file", OSError(errno.ENOSPC, FULL), FULL),
    "full while recording, told as text": (
        "ditq.calibration.storage.save_file", SafetensorError(f"I/O error: {FULL} (os error 28)"), FULL,
    ),
    "full while keeping codes": (
        "ditq.site_cache.save_file", SafetensorError(f"I/O error: {FULL} (os error 28)"), f"{FULL}.*--resume",
    ),
    "full while exporting": (
        "ditq.export.write.export_what_varies", OSError(errno.ENOSPC, FULL), f"{FULL}; finished parts are in .*--resume",
    ),
    "full while writing, told as text": (
        "ditq.export.write.export_what_varies", SafetensorError(f"I/O error: {FULL} (os error 28)"), f"{FULL}.*--resume",
    ),
    "interrupted while exporting": ("ditq.export.write.export_what_varies", KeyboardInterrupt(), "--resume"),
    "read-only": ("ditq.calibration.storage.save_file", OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only"),
}  # fmt: skip


def test_an_engine_is_evaluated_by_its_path(uninterrupted: Path, pipeline: Path) -> None:
    found = ditq.evaluate(uninterrupted, pipeline, steps=1, limit=1, conditions=PROMPTS)
    assert found.engine == "engine" and len(found.prompts) == 1 and found.sites


@pytest.mark.parametrize("case", FAILURES)
def test_no_failure_leaves_half_an_engine(
    case: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, error, says = FAILURES[case]
    recipe = tmp_path / "quick.yaml"
    recipe.write_text("passes: [{quantize: {rounding: nearest, codebook: uniform}}]\n")
    _patch(monkeypatch, place, 1, error)
    out = tmp_path / "new" / "engine"
    assert_refused(capsys, says, "compile", pipeline, "-o", out, "-r", recipe, "--limit", 1, "--steps", 1)
    left = {name for name in files_below(tmp_path) if ".engine.work" not in name}
    if "--resume" in says:  # what was finished is kept
        assert left == {"quick.yaml", "new"} and (tmp_path / "new" / ".engine.work").is_dir()
    else:
        assert left == {"quick.yaml"} and not (tmp_path / "new").exists()


# --- where the engine goes


def test_an_existing_folder_needs_force_and_must_be_an_engine(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.checkpoint.Checkpoint.load_model", lambda *_: pytest.fail("work before the check"))
    out = tmp_path / "engine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert_refused(capsys, "engine: exists already; give --force", "compile", pipeline, "-o", out)
    assert_refused(
        capsys, "is not an engine, so it is not replaced even by force", "compile", pipeline, "-o", out, "--force"
    )
    (tmp_path / "file").write_text("x")
    assert_refused(capsys, "exists already", "compile", pipeline, "-o", tmp_path / "file")
    assert_refused(capsys, "is not an engine", "compile", pipeline, "-o", tmp_path / "file", "--force")
    assert files_below(tmp_path) == ["engine", "engine/thesis.tex", "file"]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.checkpoint.Checkpoint.load_model", lambda *_: pytest.fail("work before the check"))
    (tmp_path / "file").write_text("x")
    assert_refused(capsys, "cannot be written", "compile", pipeline, "-o", tmp_path / "file" / "engine")
    assert_refused(capsys, "File name too long", "compile", pipeline, "-o", tmp_path / ("e" * 300))
    with monkeypatch.context() as patched:  # tests may run as root, who may write everywhere
        patched.setattr(os, "access", lambda path, mode: False)
        assert_refused(capsys, "cannot be written, .* is not a folder that you may write to", "compile", pipeline, "-o",
                       tmp_path / "engine")  # fmt: skip
        with pytest.raises(DitqError, match="cannot be written"):
            ditq.compile(pipeline, tmp_path / "engine")
    assert files_below(tmp_path) == ["file"]


def test_a_forced_compile_that_fails_leaves_the_old_engine(
    pipeline: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _digests(uninterrupted)
    _patch(monkeypatch, "ditq.export.write.export_what_varies", 1, OSError(errno.ENOSPC, FULL))
    command = ["compile", pipeline, "-o", uninterrupted, "--force", "--limit", 1, "--steps", 1]
    assert_refused(capsys, FULL, *command)
    left = [name for name in files_below(uninterrupted.parent) if not name.startswith(".engine.work")]
    assert _digests(uninterrupted) == before and len(left) == 4


def test_an_axis_that_the_export_fixed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [{"name": "hidden_states", "shape": [2, "image_tokens", 32]}]
    manifest = {"dropped_axes": ["batch"], "inputs": inputs, "class_name": "Some2DModel"}
    axes = {"guidance": ("batch",), "hidden_states": ("batch", "image_tokens", None)}
    _note_fixed(Engine(Path("some/engine"), manifest), axes)
    said = "note: engine: takes hidden_states with batch 2 only, since the forward of Some2DModel turns that size into a number"
    assert capsys.readouterr().err == f"{said}\n"


def test_an_unknown_target_is_refused_before_any_work(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.checkpoint.Checkpoint.load_model", lambda *_: pytest.fail("work before the check"))
    assert_refused(capsys, "target 'cpu' is not known", "compile", pipeline, "-o", tmp_path / "e", "-t", "cpu")
    says = "'torch' runs engines but cannot be compiled for; compile for one of cuda, onnxruntime-cpu"
    assert_refused(capsys, says, "compile", pipeline, "-o", tmp_path / "e", "-t", "torch")
    assert not list(tmp_path.iterdir())


def test_products_that_the_target_has_not_are_refused_before_any_work(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.compiler._statistics", lambda *_: pytest.fail("work was done"))
    recipe = tmp_path / "fp8.yaml"
    recipe.write_text("passes: [{quantize: {format: w4a8, carrier: float8_e4m3}}]\n")
    says = "onnxruntime-cpu has no product of float8_e4m3 numbers; set carrier: int8, or a format with a16"
    assert_refused(capsys, says, "compile", pipeline, "-o", tmp_path / "e", "-r", recipe)


def test_tiles_that_are_held_between_calls_are_refused_where_nothing_is_held(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.compiler._statistics", lambda *_: pytest.fail("work was done"))
    recipe = tmp_path / "searched.yaml"
    recipe.write_text("passes: [{sparse_attention: {blocks: searched, tile: 2, keep: 2}}]\n")
    says = (
        "an engine for onnxruntime-cpu keeps nothing between calls; compile with --target cuda, or set blocks: online"
    )
    assert_refused(capsys, says, "compile", pipeline, "-o", tmp_path / "e", "-r", recipe)


# --- what comes out works


def test_an_engine_draws_beside_its_original(
    uninterrupted: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(
        capsys, "sample", uninterrupted, PROMPTS[0], "-o", tmp_path / "both.png", "--against", pipeline, "--steps", 1
    )
    assert ran.code == 0, ran.err
    both = Image.open(tmp_path / "both.png")
    assert both.width >= 2 * 32 and both.height >= 32
    assert files_below(tmp_path) == ["both.png"]
    assert_refused(capsys, "no such checkpoint", "sample", uninterrupted, PROMPTS[0], "-o", tmp_path / "beside.png",
                   "--checkpoint", pipeline, "--against", tmp_path / "missing")  # fmt: skip
    assert_refused(capsys, "is empty|10,001", "sample", uninterrupted, "x" * 10_001, "--checkpoint", pipeline, "-o",
                   tmp_path / "long.png")  # fmt: skip
    assert_refused(capsys, "prompt 0 is empty", "sample", uninterrupted, "", "--checkpoint", pipeline, "-o",
                   tmp_path / "none.png")  # fmt: skip
    assert files_below(tmp_path) == ["both.png"]


def test_the_engine_is_timed_beside_its_original(
    uninterrupted: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(capsys, "bench", uninterrupted, "--against", pipeline, "--rounds", 1, "--json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)
    assert [row["name"] for row in rows] == [speed.TORCH, speed.ONNX_FLOAT, speed.ENGINE]
    assert rows[0]["times_as_fast"] == 1 and all(row["median_ms"] > 0 for row in rows)
    assert rows[-1]["target"] == "onnxruntime-cpu" and sum(rows[-1]["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(("free", "names"), [(10**9, [speed.HALF, speed.ENGINE]), (1000, [speed.ENGINE])])
def test_on_a_gpu_the_original_is_timed_in_bfloat16_where_it_has_room(
    free: int, names: list[str], uninterrupted: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the GPU's place, and without torch.compile, which takes a minute."""
    monkeypatch.setattr(speed, "free_memory", lambda _: free)
    engine, checkpoint = ditq.load_engine(uninterrupted), Checkpoint.open(pipeline)
    inputs = speed.real_call(checkpoint, engine)
    found, reference = speed.on_gpu(engine, checkpoint, inputs, 1, torch.device("cpu"), compiled=False)
    assert list(found.timings) == names and reference == names[0]


def test_a_report_of_a_checkpoint_that_is_not_built_in(
    uninterrupted: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[Any, ...]] = []
    monkeypatch.setattr(engine_report, "compare_speed", lambda *_, **__: (None, ""))
    monkeypatch.setattr(engine_report, "peak_memory", lambda place, *arguments: measured.append((place, arguments)))
    monkeypatch.setattr(engine_report, "write_report", lambda *_: None)
    found = engine_report.report_on(uninterrupted, str(pipeline), conditions=PROMPTS[:1], steps=1, where=tmp_path)
    assert len(found.prompts) == 1 and found.summary["psnr"] > 0
    for place, arguments in measured:  # what a process of its own is told to run does run
        getattr(engine_report, place.partition(":")[2])(*arguments)
    assert len(measured) == 2


def test_engine_and_original_are_compared_on_one_call_that_both_take(
    uninterrupted: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an engine for pictures of 4 x 4 tokens alone."""
    monkeypatch.setattr(speed, "only_picture", lambda _: (4, 4))
    seen: list[int] = []
    monkeypatch.setattr(
        engine_report, "called", lambda _, inputs: lambda: seen.append(inputs["hidden_states"].shape[1])
    )
    for once in (engine_report.run_engine_once, engine_report.run_original_once):  # whose memory is measured
        once(str(uninterrupted), str(pipeline))
    alone = Checkpoint.open(pipeline / "transformer")
    assert speed.real_call(alone, ditq.load_engine(uninterrupted))["hidden_states"].shape[1] == 16
    assert seen == [16, 16]


def test_an_engine_of_a_family_of_one_size_is_for_the_size_that_was_calibrated_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved_checkpoint("pixart", tmp_path / "pixart")
    usual = checkpoint.config["sample_size"]
    arguments = {**ARGUMENTS["pixart"], "height": 48, "width": 64}
    ditq.calibrate(checkpoint, tmp_path / "stats", CONDITIONS["pixart"], arguments=arguments, bins=1, rows_per_bin=8)
    out = tmp_path / "engine"
    recipe = ditq.Recipe.from_dict({"name": "plain", "passes": [{"quantize": {"format": "w8a8"}}]}, "here")
    ditq.compile(checkpoint, out, recipe, CompileOptions(statistics=tmp_path / "stats", progress=False))
    shapes = {entry["name"]: entry["shape"] for entry in Engine.open(out).manifest["inputs"]}
    assert shapes["hidden_states"][2:] == [12, 16] != [usual, usual]
    found = ditq.evaluate(out, checkpoint, conditions=CONDITIONS["pixart"], limit=1, layers=False, progress=False)
    assert found.summary["psnr"] > 20
    assert run(capsys, "doctor", str(out))[0] == 0
    assert run(capsys, "bench", str(out), "--against", str(tmp_path / "pixart"), "--rounds", "1")[0] == 0
