"""The documentation is in step with the code: links, commands, settings, recipes, and examples that really work."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ditq.checkpoint import Checkpoint
from ditq.cli import cli
from ditq.export.engine import _KEYS
from ditq.export.targets import targets
from ditq.families import families
from ditq.inspection import inspect_checkpoint
from ditq.passes import passes
from ditq.recipe import SHIPPED, Recipe, load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE_FILE = re.compile(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE_BUILDER = re.compile(r"^<!-- builder: (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(page: Path) -> set[str]:
    """The anchors that headings of a page get on GitHub."""
    titles = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def table_after(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    text = (ROOT / "docs" / page).read_text().split(f"\n{heading}\n", 1)[1]
    found = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert found is not None
    rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in found[0].splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_points_to_a_file_and_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {link}"
        assert place.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert not anchor or anchor in anchors(place), f"{page.name}: {link}"


def command_lines() -> Iterator[tuple[str, str, bool]]:
    """(page, command line, whether it is complete): shell blocks are, mentions in the text need not be."""
    for page in PAGES:
        text = page.read_text()
        for language, block in FENCE.findall(text):
            if language in ("bash", "console", "sh"):
                for line in block.replace("\\\n", " ").splitlines():
                    for part in line.split("&&"):
                        if part.strip().startswith("ditq "):
                            yield page.name, part.strip(), True
        for code in re.findall(r"`(ditq [^`]*)`", prose(text)):
            yield page.name, " ".join(code.split()), False


@pytest.mark.parametrize("recipe", sorted((ROOT / "docs" / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_recipe_fits_the_built_in_checkpoint(recipe: Path) -> None:
    found = load_recipe(recipe)
    assert found.name == recipe.stem and found.description
    assert inspect_checkpoint(Checkpoint.open("mini"), found).plan


@pytest.mark.parametrize(("page", "line", "complete"), command_lines())
def test_every_command_line_uses_commands_and_options_that_exist(page: str, line: str, complete: bool) -> None:
    name, *words = shlex.split(line, comments=True)[1:]
    if name in ("COMMAND", "--version", "--help"):
        return
    assert name in cli.commands, f"{page}: {line}"
    command = cli.commands[name]
    spelled = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
    known = {*spelled, "-h", "--help"}
    unknown = [word for word in words if word.startswith("-") and word not in known]
    assert not unknown, f"{page}: {line}: {unknown}"
    if complete:
        try:
            parent = click.Context(cli, **cli.context_settings)  # else the command keeps a help option of its own
            command.make_context(
                name, words, parent=parent
            )  # reads options and arguments, with their types, and runs nothing
        except click.UsageError as error:
            pytest.fail(f"{page}: {line}: {error.format_message()}")


def test_pipelines_around_an_engine_are_told_their_dtype() -> None:
    """Else the text encoders keep the dtype that they were stored in, and a pipeline in float32 fails in the middle."""
    calls = [
        call for page in PAGES for call in re.findall(r"from_pretrained\([^)]*transformer=[^)]*\)", page.read_text())
    ]
    assert calls and all("torch_dtype=" in call for call in calls), calls


def test_every_command_has_its_section() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "command-line.md").read_text(), re.MULTILINE)
    assert set(cli.commands) <= {name for heading in headings for name in heading.split(", ")}


def default_of(item: Field[Any]) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]


@pytest.mark.parametrize("name", passes())
def test_every_setting_of_a_pass_is_in_the_recipes_page_with_its_default(name: str) -> None:
    rows = {row[0].strip("`"): row[1:] for row in table_after("recipes.md", f"### `{name}`")}
    settings = {item.name: item for item in fields(passes()[name])}
    assert list(rows) == list(settings)
    for key, item in settings.items():
        default, meaning = rows[key]
        assert yaml.safe_load(default.strip("`")) == default_of(item), key
        for choice in item.metadata["choices"] or ():
            assert f"`{choice}`" in meaning, f"{key}: {choice}"


def test_every_shipped_recipe_is_in_the_recipes_page_with_its_passes() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_after("recipes.md", "## Shipped recipes")}
    assert sorted(rows) == shipped_recipes()
    for name, said in rows.items():
        steps = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())["passes"]
        assert [part.split(" (")[0] for part in said.split(", ")] == [next(iter(step)) for step in steps], name


# The guides' recipes use what the guide adds, so they are parsed with it below.
@pytest.mark.parametrize("page", [page for page in PAGES if not page.name.startswith("add-a-")], ids=lambda p: p.name)
def test_every_recipe_in_the_pages_parses(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text()):
        if language == "yaml":
            Recipe.from_dict(yaml.safe_load(block), page.name)


@pytest.mark.parametrize("name", passes())
def test_the_recipe_in_the_docstring_of_a_pass_parses(name: str) -> None:
    _, example, block = (passes()[name].__doc__ or "").partition("Example:\n")
    assert example, f"{name} has no example"
    Recipe.from_dict({"passes": yaml.safe_load(block)}, name)


def test_the_engine_page_names_every_field_family_and_target() -> None:
    text = (ROOT / "docs" / "engine.md").read_text()
    manifest = " ".join(row[0] for row in table_after("engine.md", "## engine.json"))
    assert set(_KEYS) <= set(re.findall(r"`(\w+)`", manifest))
    limits = table_after("engine.md", "## Limits")
    assert sorted(row[0].strip("`") for row in limits) == sorted(families())
    assert all(f"`{name}`" in text for name in targets())


# What a folder may import of ditq, from docs/architecture.md.
HELPERS = {"errors", "formats", "given", "processes", "progress", "quiet", "suggest"}
READ_OF_CALIBRATION = {
    "calibration.statistics",
    "calibration.input_statistics",
    "calibration.step_weights",
    "calibration.record",
    "calibration.batches",
    "calibration.further",
    "calibration.sampler",
}
ARROWS = {
    "ditq/numerics": {"numerics", "quiet"},
    "ditq/nn": {"nn", "numerics"},
    "ditq/kernels": {"kernels", "nn", "numerics", "errors"},
    "ditq/families": {"families", "numerics.token_layout"},
    "ditq/passes": {"passes", "graph", "parts", "nn", "numerics"} | READ_OF_CALIBRATION | HELPERS,
    "export": {"export", "kernels", "nn", "numerics", "memory"} | HELPERS,
}


@pytest.mark.parametrize("folder", ARROWS)
def test_the_arrows_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ditq."):
                imported = (node.module or "").removeprefix("ditq.")
                allowed = any(imported == name or imported.startswith(f"{name}.") for name in ARROWS[folder])
                assert allowed, f"{path.relative_to(ROOT)} imports {node.module}"


_PARSE = """
import pathlib, re, yaml
from ditq.families import families
from ditq.recipe import Recipe
assert "auraflow" in families()
for page in pathlib.Path("docs").glob("add-a-*.md"):
    for block in re.findall(r"^```yaml\\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        print(Recipe.from_dict(yaml.safe_load(block), page.name).passes)
"""


def test_the_worked_examples_work(tmp_path: Path) -> None:
    """Every file of the add-a pages is written into a copy of the source; then their own tests run there."""
    for name in ("ditq", "calibration", "export", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "assets")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    added, builders = [], []
    for page in sorted((tmp_path / "docs").glob("add-a-*.md")):
        text = page.read_text()
        builders += EXAMPLE_BUILDER.findall(text)
        for place, code in EXAMPLE_FILE.findall(text):
            (tmp_path / place).write_text(code)
            added.append(place)
    assert len(added) == 7 and len(builders) == 1
    small = tmp_path / "tests" / "families_small.py"
    for name, entry in builders:
        text = small.read_text().replace("FAMILIES = (", f'FAMILIES = ("{name}", ', 1)
        small.write_text(text.replace("}  # fmt: skip", f"{entry}}}  # fmt: skip", 1))

    def run(*arguments: str) -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run("-c", _PARSE)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "--show-capture=no"]
    tests = [place for place in added if place.startswith("tests/")]
    # Of exports, which take long, and of folds one family; of the rest all.
    whole = [Path(place).stem for place in tests if "export" not in place]
    run("-m", "pytest", *options, "tests/passes/test_folds.py", *tests, "-k", " or ".join(["auraflow", *whole]))
