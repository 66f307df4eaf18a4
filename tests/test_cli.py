"""The commands explain themselves, list what there is, and show checkpoints, statistics and engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import ditq
from ditq.cli import cli
from ditq.commands import arguments_of
from ditq.errors import DitqError
from ditq.export.targets import targets
from ditq.families import families
from ditq.passes import passes
from ditq.recipe import shipped_recipes
from tests.command_line import assert_refused, run
from tests.small_checkpoint import write_pipeline

ONLY_LISTS = {"recipes", "passes", "families", "targets", "doctor", "bench"}  # their help needs no example


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, name, "--help")
    assert ran.code == 0 and ran.err == ""
    said = ran.out.split("Options:")[0]
    assert name in ONLY_LISTS or f"ditq {name} " in said.split("\n", 1)[1], f"no example in `ditq {name} --help`"
    assert len(said.split()) > 10
    assert run(capsys, name, "-h").out == ran.out
    for option in cli.commands[name].params:
        assert (
            not isinstance(option, click.Option) or option.help or option.name in ("seed", "out", "rounds", "show_help")
        )


def test_the_first_help_shows_the_three_commands_to_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "--help")
    assert ran.code == 0
    for example in ("ditq compile mini -o engine", "ditq sample engine", "ditq evaluate engine --against mini"):
        assert example in ran.out
    alone = run(capsys)
    assert alone.code == 2 and "Usage:" in alone.out and alone.err == ""


def test_a_mistyped_command_or_option_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "No such command 'compil'", "compil", "mini")
    assert_refused(capsys, "No such option.*--recipes", "compile", "mini", "-o", tmp_path / "e", "--recipes", "w4a8")
    assert_refused(capsys, "Missing option '-o'", "compile", "mini")
    assert_refused(capsys, "Missing argument 'CHECKPOINT'", "compile", "-o", tmp_path / "e")
    assert_refused(capsys, "'--limit'.* 0 is not in the range", "compile", "mini", "-o", tmp_path / "e", "--limit", 0)
    assert_refused(capsys, "'--seed'", "compile", "mini", "-o", tmp_path / "e", "--seed", 2**70)
    assert_refused(capsys, "'--seed'", "sample", "engine", "a cat", "--seed", -1)
    assert_refused(
        capsys, "--set height: write NAME=VALUE", "calibrate", "mini", "-o", tmp_path / "s", "--set", "height"
    )
    assert list(tmp_path.iterdir()) == []


def test_set_takes_json_where_it_is_json_and_text_elsewhere() -> None:
    given = ("guidance_scale=4.5", "use=true", "negative_prompt=a blurry=cat", "sizes=[1, 2]", "empty=")
    assert arguments_of(given) == {
        "guidance_scale": 4.5, "use": True, "negative_prompt": "a blurry=cat", "sizes": [1, 2], "empty": ""
    }  # fmt: skip
    with pytest.raises(DitqError, match="write NAME=VALUE"):
        arguments_of(("=3",))


def test_a_mistyped_metric_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "psrn", "evaluate", "engine", "--fail-below", "psrn=22")
    assert_refused(capsys, "psnr", "evaluate", "engine", "--fail-below", "psnr=high")


# --- what only lists


def test_recipes_passes_families_and_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for command, names in (
        ("recipes", shipped_recipes()), ("passes", passes()), ("families", families()),
        ("targets", targets()),
    ):  # fmt: skip
        ran = run(capsys, command)
        assert ran.code == 0
        assert {line.split()[0] for line in ran.out.splitlines()[1:]} == set(names)


@pytest.mark.parametrize("name", sorted(passes()))
def test_a_pass_is_shown_with_all_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "passes", name)
    settings = passes()[name]().settings()
    rows = {line.split()[0] for line in ran.out.partition("\nsetting ")[2].splitlines()[1:]}
    assert ran.code == 0 and rows == set(settings)
    assert "Example:" in ran.out


def test_an_unknown_pass_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "unknown 'rotat'; did you mean 'rotate'", "passes", "rotat")


def test_doctor_names_what_is_installed_and_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "doctor")
    assert ran.code == 0
    for line in ("Python 3", "torch ", "diffusers ", "onnxruntime ", "target onnxruntime-cpu: works", "GPU "):
        assert line in ran.out


# --- inspect


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("cli") / "pipeline")


def test_inspect_shows_a_checkpoint_and_what_a_recipe_would_do(
    pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run(capsys, "inspect", pipeline, "-r", "w4a4")
    assert ran.code == 0 and "FluxTransformer2DModel" in ran.out and "family flux" in ran.out
    line = next(line for line in ran.out.splitlines() if line.startswith("transformer_blocks.0.attn.to_q "))
    assert "token" in line and "query" in line and "64x64" in line and "smooth+centre, rotate hadamard, w4a4" in line
    kept = next(line for line in ran.out.splitlines() if line.startswith("proj_out "))
    assert kept.endswith("kept")
    assert "recipe w4a4 adds" in ran.out and "% multiply-adds at run time" in ran.out

    values = json.loads(run(capsys, "inspect", pipeline, "-r", "w4a4", "--json").out)
    sites = {site["site"]: site for site in values["sites"]}
    assert values["recipe"]["name"] == "w4a4" and values["family"] == "flux"
    assert sites["transformer_blocks.0.attn.to_q"]["shape"] == [64, 64]
    roles = {row["role"]: row for row in values["roles"]}
    for role in ("token", "modulation", "embedder", "final"):
        of_role = [site for site in values["sites"] if site["role"] == role]
        assert roles[role]["linears"] == len(of_role)
        assert roles[role]["macs"] == sum(site["macs"] for site in of_role)
        assert roles[role]["parameters"] == sum(site["shape"][0] * site["shape"][1] for site in of_role)
    assert roles["attention scores"]["macs"] == 2 * (2 * 2 * 80 * 80 * 32)  # two attentions of two heads, 80 tokens


def test_inspect_reads_no_weights(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditq.safetensors_files.TensorFile.read", lambda *_: pytest.fail("read a weight"))
    assert run(capsys, "inspect", pipeline).code == 0


def test_calibrate_and_inspect_its_statistics(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.csv").write_text('prompt,note\n"red apple, fluent 3d",first\n')
    command = ["calibrate", pipeline, "-o", tmp_path / "stats", "--prompts", tmp_path / "prompts.csv", "--bins", 2]
    ran = run(capsys, *command, "--set", "width=48")
    assert ran.code == 0, ran.err
    assert "over 1 conditions of 2 steps, in 2 bins" in ran.out and "next: ditq compile" in ran.out

    shown = run(capsys, "inspect", tmp_path / "stats")
    assert shown.code == 0 and "1 conditions, 2 steps, 2 bins" in shown.out
    values = json.loads(run(capsys, "inspect", tmp_path / "stats", "--json").out)
    found = values["inputs"]["transformer_blocks.0.attn.to_q"]
    assert found["width"] == 64 and 0 < found["rms"] <= found["absmax"]
    assert values["condition_count"] == 1 and values["steps"] == 2

    assert_refused(capsys, "stats: exists already; replace it with --force", *command)
    assert_refused(capsys, "did you mean 'width'", *command, "--force", "--set", "widht=48")
    assert json.loads(run(capsys, "inspect", tmp_path / "stats", "--json").out) == values


def test_help_starts_without_torch() -> None:
    """`ditq --help` answers at once: it takes seconds to import what only the work needs."""
    program = "import sys, ditq.cli; print(sorted({'torch', 'diffusers', 'onnx'} & set(sys.modules)))"
    root = str(Path(ditq.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_console_script_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    """In a process of its own, where libraries may print to stderr what they like."""
    root = str(Path(ditq.__file__).parents[1])
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "num_layers": "x", "new_key": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    done = subprocess.run(
        [sys.executable, "-m", "ditq.cli", "compile", str(tmp_path), "-o", str(tmp_path / "engine")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
