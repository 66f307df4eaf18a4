"""Recipes say what is wrong with them in one line, before anything runs; and are read back as they were written out."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from ditq.errors import DitqError
from ditq.passes import passes
from ditq.recipe import Recipe, load_recipe, shipped_recipes
from tests.command_line import assert_refused
from tests.families_small import FAMILIES, small_graph
from tests.small_checkpoint import files_below, write_transformer


def _passes(text: str) -> str:
    return f"name: mine\npasses:\n  - {text}\n"


# What is in the file, and what the line must say.
WRONG: dict[str, tuple[str, str]] = {
    "unknown pass": (_passes("smoth: {}"), "pass: unknown 'smoth'; did you mean 'smooth'"),
    "unknown pass, nothing near": (_passes("xyz"), "unknown 'xyz'; known: .*quantize, quantize_attention,"),
    "unknown setting": (_passes("rotate: {mod: search}"), "pass 'rotate' has no setting 'mod'; did you mean 'mode'"),
    "a number as setting": (_passes("smooth: {1: 2}"), "pass 'smooth' has no setting 1"),
    "unknown key": ("name: x\npases: []\n", "unknown 'pases'; did you mean 'passes'"),
    "not a choice": (_passes("rotate: {mode: serch}"), "mode: unknown 'serch'; did you mean 'search'"),
    "word for a number": (_passes("smooth: {alpha: half}"), "alpha is 'half', must be a number or search"),
    "steps": (_passes("rotate: {mode: learned, steps: 0}"), "steps is 0, must be 1 or more"),
    "codebook to judge by": (
        _passes("smooth: {codebook: unifrm}"),
        "codebook: unknown 'unifrm'; did you mean 'uniform'",
    ),
    "static scales before smooth": (
        _passes("quantize_attention: {format: float8_e4m3, scales: static, smooth_keys: false}") + "  - smooth: {}\n",
        "pass 'smooth' changes what 'quantize_attention' has measured; put it before 'quantize_attention'",
    ),
    "blocks of a whole model": (
        _passes("quantize: {}") + "  - reconstruct: {scope: model, select: [blocks.0]}\n",
        "select is of blocks, and scope: model learns all; set scope: block",
    ),
    "grid": (_passes("smooth: {alpha: search, grid: 1}"), "grid is 1, must be 2 or more"),
    "boolean for a number": (_passes("quantize: {group_size: true}"), "group_size is True, must be a whole number"),
    "number for a boolean": (_passes("smooth: {centre: 1}"), "centre is 1, must be true or false"),
    "fraction for a whole number": (
        _passes("quantize: {group_size: 1.5}"),
        "group_size is 1.5, must be a whole number",
    ),
    "number for a list": (_passes("smooth: {select: 3}"), "select is 3, must be a list"),
    "numbers for words": (_passes("smooth: {select: [1, 2]}"), r"select is \[1, 2\], must be a list of words"),
    "not a number": (_passes("smooth: {alpha: .nan}"), "alpha is nan"),
    "infinite": (_passes("quantize: {damping: .inf}"), "damping is inf"),
    "out of range": (_passes("smooth: {alpha: 1.5}"), "alpha is 1.5, must be between 0 and 1"),
    "negative damping": (_passes("quantize: {damping: -1.0}"), "damping is -1.0, must be above 0"),
    "idle by a word": (
        _passes("rotate: {mode: hadamard, tolerance: 0.1}"),
        "tolerance is 0.1, which has an effect with mode: search or learned only, not hadamard; leave it out",
    ),
    "idle by a number": (
        _passes("linear_attention: {tile: 4}"),
        "pass 'linear_attention': tile is 4, which has an effect with window above 0 only, not 0; leave it out",
    ),
    "idle beside a number": (
        _passes("sparse_attention: {keep: 2, mass: 0.5}"),
        "pass 'sparse_attention': mass is 0.5, which has an effect with keep: mass only, not 2; leave it out",
    ),
    "idle error": (
        _passes("sparse_attention: {keep: mass, error: 0.5}"),
        "error is 0.5, which has an effect with keep: search only, not mass; leave it out",
    ),
    "idle tile": (
        _passes("token_order: {order: hilbert, tile: 4}"),
        "tile is 4, which has an effect with order: windows only, not hilbert; leave it out",
    ),
    "negative tolerance": (_passes("rotate: {tolerance: -0.5}"), "tolerance is -0.5, must be 0 or more"),
    "negative group": (_passes("quantize: {group_size: -8}"), "group_size is -8"),
    "unknown kind": (_passes("rotate: {kinds: [hadamart]}"), r"unknown kinds \['hadamart'\]"),
    "block of 48": (_passes("rotate: {block: 48}"), "block is 48, must be a power of two"),
    "no kinds": (_passes("rotate: {kinds: []}"), "unknown kinds"),
    "unknown format": (_passes("quantize: {format: w9a8}"), "unknown format 'w9a8'; write w<2-8>a<4-8 or 16>"),
    "format 16": (_passes("rotate: {format: w16a16}"), "unknown format 'w16a16'"),
    "unknown codebook": (
        _passes("quantize: {codebook: twinlog}"),
        "codebook: unknown 'twinlog'; did you mean 'twin_log'",
    ),
    "groups of twin_log": (
        _passes("quantize: {codebook: twin_log, group_size: 32}"),
        "'twin_log' .* takes no group_size",
    ),
    "fp4 of 3 bits": (_passes("quantize: {codebook: e2m1, format: w3a8}"), "'e2m1' is for weights of 4 bits, not 3"),
    "rule without select": (_passes("quantize: {rules: [{format: w4a8}]}"), "has no select"),
    "rule a word": (_passes("quantize: {rules: [keep]}"), "the rule keep has no select"),
    "rule: unknown key": (
        _passes('quantize: {rules: [{select: "*", kep: true}]}'),
        "unknown 'kep'; did you mean 'keep'",
    ),
    "rule: codebook": (_passes('quantize: {rules: [{select: "*", codebook: log}]}'), "codebook: unknown 'log'"),
    "rule: codebook a list": (_passes('quantize: {rules: [{select: "*", codebook: [a]}]}'), r"codebook is \['a'\]"),
    "rule: format": (_passes('quantize: {rules: [{select: "*", format: 8}]}'), "format is 8, must be a word"),
    "rule: rounding": (_passes('quantize: {rules: [{select: "*", rounding: gtpq}]}'), "did you mean 'gptq'"),
    "rule: activation": (_passes('quantize: {rules: [{select: "*", activation: row}]}'), "activation: unknown 'row'"),
    "rule: keep": (_passes('quantize: {rules: [{select: "*", keep: "yes"}]}'), "keep is 'yes', must be true or false"),
    "rule: group": (_passes('quantize: {rules: [{select: "*", group_size: 6.4}]}'), "group_size is 6.4"),
    "rule: select a number": (_passes("quantize: {rules: [{select: 5, keep: true}]}"), "select must be a pattern"),
    "settings a word": (_passes("smooth: strong"), "the settings of pass 'smooth' must be a mapping"),
    "settings false": (_passes("smooth: false"), "the settings of pass 'smooth' must be a mapping"),
    "two passes in one item": (_passes("{smooth: {}, rotate: {}}"), "each item of passes is one"),
    "no passes": ("name: x\n", "passes is empty"),
    "empty passes": ("name: x\npasses: []\n", "passes is empty"),
    "passes a mapping": ("passes: {smooth: {}}\n", "passes is empty"),
    "a list": ("- smooth\n", "a recipe is a mapping"),
    "empty file": ("", "a recipe is a mapping"),
    "not YAML": ("passes: [unclosed\n", "not a readable YAML file"),
    "python tag": (
        "passes: !!python/object/apply:os.system ['touch ran']\n",
        "not a readable YAML file.*python/object",
    ),
    "impossible date": ("name: 2024-13-45\npasses: [smooth]\n", "not a readable YAML file"),
    "no number": ("name: !!int 'x'\npasses: [smooth]\n", "not a readable YAML file"),
    "candidates that are no words": (
        _passes("quantize") + "budget: bits=4\ncandidates: [2, 3]\n",
        "a candidate is 2, must be a word",
    ),
    "binary": ("\x00\x01\x02", "not a readable YAML file"),
    "deep": ("[" * 500, "not a readable YAML file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = WRONG[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DitqError, match=says):
        load_recipe(path)
    assert_refused(
        capsys, r"^error: \S*mine\.yaml: .*" + says.lstrip("^"), "compile", "mini", "-o", tmp_path / "e", "-r", path
    )
    assert files_below(tmp_path) == ["mine.yaml"]


def test_a_recipe_that_is_not_there_or_not_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "unknown 'w4a9'; did you mean 'w4a", "inspect", "mini", "-r", "w4a9")
    assert_refused(capsys, "unknown '.*gone.yaml'", "inspect", "mini", "-r", tmp_path / "gone.yaml")
    assert_refused(capsys, "recipe: unknown", "inspect", "mini", "-r", tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    assert_refused(capsys, "latin.yaml: not a readable YAML", "inspect", "mini", "-r", tmp_path / "latin.yaml")


# --- what only the model can tell is found before the minutes of calibration

UNFIT = {
    "smooth selects nothing": (["smooth: {select: [no_such_layer]}"], "selector 'no_such_layer' matches no linear"),
    "rotate selects nothing": (["rotate: {select: ['role:tokens']}"], "selector 'role:tokens' matches no linear"),
    "quantize selects nothing": (["quantize: {select: ['kind:qury']}"], "selector 'kind:qury' matches no linear"),
    "rule selects nothing": (["quantize: {rules: [{select: blocks.99.*, keep: true}]}"], "'blocks.99.*' matches no"),
    "group does not divide": (
        ["quantize: {group_size: 48, codebook: uniform}"],
        "group_size 48 does not divide its 64",
    ),
    "smooth after rotate": (["rotate", "smooth"], "pass 'smooth' cannot follow 'rotate' on"),
    "smooth twice": (["smooth", "smooth"], "pass 'smooth' cannot follow 'smooth' on"),
    "rotate after quantize": (["quantize", "rotate"], "pass 'rotate' cannot follow 'quantize' on"),
    "quantize twice": (["quantize", "quantize"], "pass 'quantize' cannot follow 'quantize' on"),
    "smooth into what is quantized": (
        ["quantize: {select: ['role:modulation']}", "smooth"],
        "pass 'smooth' cannot follow 'quantize' on \\S*norm",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_recipe_that_does_not_fit_the_model_fails_before_calibration(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, says = UNFIT[case]
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\n" + "".join(f"  - {line}\n" for line in lines))
    checkpoint = write_transformer(tmp_path / "ckpt")
    calibrated: list[object] = []
    monkeypatch.setattr("ditq.compiler.calibrate", lambda *_, **__: calibrated.append(1))
    before = files_below(tmp_path)
    assert_refused(capsys, says, "compile", checkpoint, "-o", tmp_path / "engine", "-r", path)
    assert_refused(capsys, says, "inspect", checkpoint, "-r", path)
    assert not calibrated and files_below(tmp_path) == before


def test_quantizing_different_linears_in_two_passes_is_fine() -> None:
    steps = [{"quantize": {"select": [f"kind:{kind}"]}} for kind in ("query", "feed_forward_out")]
    recipe = Recipe.from_dict({"name": "two", "passes": steps}, "two")
    assert {len(what) for what in recipe.preview(small_graph("dit")).values()} == {1}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_read_back_as_they_were_written_out(name: str) -> None:
    recipe = load_recipe(name)
    written = yaml.safe_load(yaml.safe_dump(recipe.to_json()))
    again = Recipe.from_dict(written, name)
    assert again == recipe and again.to_json() == recipe.to_json()
    assert recipe.name == name and recipe.description


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_recipes_plan_every_token_and_modulation_linear_of_every_family(name: str, family: str) -> None:
    graph = small_graph(family)
    if family == "pixart":  # its modulation linear is outside the blocks and its tables are no linears
        assert [s.name for s in graph.sites.values() if s.role == "modulation"]
    plan = load_recipe(name).preview(graph)
    wanted = {site.name for site in graph.sites.values() if site.role in ("token", "modulation")}
    assert {site for site, what in plan.items() if any(re.match(r"w\da\d", text) for text in what)} == wanted


def test_the_example_in_every_passs_docstring_is_a_recipe() -> None:
    for name, found in passes().items():
        text = (found.__doc__ or "").partition("Example:\n")[2]
        assert text, f"{name} has no example"
        indent = len(text) - len(text.lstrip())
        steps: Any = yaml.safe_load("\n".join(line[indent:] for line in text.splitlines()))
        recipe = Recipe.from_dict({"passes": steps}, f"the example of {name}")
        assert found in [type(step) for step in recipe.passes], name


def test_every_setting_says_what_it_means_and_has_a_default_that_passes_its_own_check() -> None:
    for name, found in passes().items():
        assert all(item.metadata.get("help") for item in fields(found)), name
        before: list[object] = [{earlier: {}} for earlier in found.only_after[:1]] + [{"prune": {}}] * found.trains
        Recipe.from_dict({"passes": [*before, {name: found().settings()}]}, name)


def test_a_word_where_words_are_due_is_a_list_of_one() -> None:
    made = Recipe.from_dict({"passes": [{"smooth": {"select": "role:token"}}]}, "test")
    assert made.passes[0].settings()["select"] == ["role:token"]


def test_a_pass_without_settings_may_be_a_bare_name() -> None:
    bare = Recipe.from_dict({"passes": ["smooth"]}, "x")
    assert bare.passes == Recipe.from_dict({"passes": [{"smooth": None}]}, "x").passes


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"budget": "bits=lots"}, r"test: budget 'bits=lots': not understood"),
        ({"budget": 4.5}, "test: budget is 4.5; write it as on the command line"),
        ({"budget": "bits=4", "candidates": "w1,w4"}, "test: budget: unknown candidate 'w1'"),
        ({"candidates": ["w3", "w4"]}, "test: candidates are what a budget chooses from"),
    ],
)
def test_a_budget_in_a_recipe_is_checked_like_one_on_the_command_line(entries: dict[str, object], said: str) -> None:
    with pytest.raises(DitqError, match=said):
        Recipe.from_dict({"passes": ["quantize"], **entries}, "test")
