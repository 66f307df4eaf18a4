"""What to draw samples of: prompts or class labels from a file, or a prompt set that comes with ditq."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar

from ditq.errors import DitqError

ConditionKind = Literal["prompt", "class"]
Item = TypeVar("Item")

LONGEST_PROMPT = 9_999  # characters; far beyond what any text encoder reads, so a longer line is a mistake in the file
PROMPT_COLUMNS = ("prompt", "caption", "text")
LABEL_COLUMNS = ("label", "class", "class_label")

BUILTIN_SETS = {
    "vbench": ("ditq.calibration", "prompt_sets/vbench.txt"),
    "mini": ("ditq", "assets/mini/captions_calibration.txt"),
    "mini-heldout": ("ditq", "assets/mini/captions_heldout.txt"),
}


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in order, or of a set that comes with ditq (`BUILTIN_SETS`), if no file is called like it.

    `.txt`: one a line. `.csv`: the column prompt, caption or text of a file with a heading line, or all lines of a file
    of one column without one. `.jsonl`: one JSON object a line with the key prompt, caption or text.

    Raises DitqError for a file that cannot be read, is not UTF-8, holds no prompt, an empty prompt, a prompt of
    10,000 characters or more, or lacks the column.
    """
    path = Path(path)
    if str(path) in BUILTIN_SETS and not path.is_file():
        return builtin_prompts(str(path))
    return _check_prompts(_read_column(path, PROMPT_COLUMNS, "prompt"), str(path))


def read_labels(path: str | Path) -> list[int]:
    """The class labels of a file, in order: as `read_prompts`, but integers (column or key label or class)."""
    path = Path(path)
    labels = []
    for line, value in _read_column(path, LABEL_COLUMNS, "label"):
        text = value.strip()
        if not text.isascii() or not text.isdigit():
            raise DitqError(f"{path}: line {line}: {value[:40]!r} is not a class label; give one whole number a line")
        labels.append(int(text))
    return labels


def read_conditions(path: str | Path, kind: ConditionKind) -> list[str] | list[int]:
    """The prompts (`kind` "prompt") or class labels (`kind` "class") of a file."""
    return read_labels(path) if kind == "class" else read_prompts(path)


def builtin_prompts(name: str) -> list[str]:
    """The prompts of a set that comes with ditq: "vbench" (944), "mini" (128) or "mini-heldout" (64)."""
    if name not in BUILTIN_SETS:
        raise DitqError(f"no prompt set is called '{name}'; there are {', '.join(BUILTIN_SETS)}")
    package, file = BUILTIN_SETS[name]
    text = resources.files(package).joinpath(file).read_text(encoding="utf-8")
    return _check_prompts(list(enumerate(text.splitlines(), start=1)), f"prompt set '{name}'")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread over all of them, in order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise DitqError for a list of prompts that is empty or holds a prompt that `read_prompts` would refuse."""
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise DitqError(f"prompt {index} is {type(prompt).__name__} {prompt!r}; this checkpoint takes text prompts")
    _check_prompts(list(enumerate(prompts)), "prompts", unit="prompt")


def _check_prompts(lines: list[tuple[int, str]], where: str, unit: str = "line") -> list[str]:
    if not lines:
        raise DitqError(f"{where}: no prompts; give at least one")
    for number, prompt in lines:
        if not prompt.strip():
            raise DitqError(f"{where}: {unit} {number} is empty; remove it or write a prompt there")
        if not is_unicode(prompt):
            raise DitqError(f"{where}: {unit} {number} holds half a character, {prompt[:40]!a}; write it as UTF-8")
        if len(prompt) > LONGEST_PROMPT:
            raise DitqError(
                f"{where}: {unit} {number} has {len(prompt):,} characters; a prompt has at most {LONGEST_PROMPT:,}"
            )
    return [prompt.strip() for _, prompt in lines]


def is_unicode(text: str) -> bool:
    """Whether it can be written down: no half of a surrogate pair, as \\ud800 in JSON or a byte that is not UTF-8 gives."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_column(path: Path, columns: tuple[str, ...], what: str) -> list[tuple[int, str]]:
    """(line number, value) of each entry of a .txt, .csv or .jsonl file."""
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DitqError(f"{path}: {what}s are read from {', '.join(readers)} files, not '{path.suffix}'")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DitqError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from error
    except OSError as error:
        raise DitqError(f"{path}: cannot be read ({error.strerror}); give a file of {what}s") from error
    lines = reader(path, text, columns)
    if not lines:
        raise DitqError(f"{path}: no {what}s; write at least one")
    return lines


def _read_txt(path: Path, text: str, columns: tuple[str, ...]) -> list[tuple[int, str]]:
    # not str.splitlines(), which also breaks a line at form feeds and Unicode separators
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1)]


def _read_csv(path: Path, text: str, columns: tuple[str, ...]) -> list[tuple[int, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            rows.append((reader.line_num, row or [""]))
    except csv.Error as error:
        raise DitqError(f"{path}: line {reader.line_num}: not a valid CSV line ({error})") from error
    if not rows:
        return []
    heading = [name.strip().lower() for name in rows[0][1]]
    column = next((heading.index(name) for name in columns if name in heading), None)
    if column is not None:
        rows = rows[1:]
    elif len(heading) == 1:
        column = 0
    else:
        raise DitqError(f"{path}: no column is called {', '.join(columns)}; its columns are {', '.join(rows[0][1])}")
    for number, row in rows:
        if len(row) != len(heading):
            raise DitqError(
                f"{path}: line {number} has {len(row)} columns, line 1 {len(heading)}; quote texts with commas"
            )
    return [(number, row[column]) for number, row in rows]


def _read_jsonl(path: Path, text: str, columns: tuple[str, ...]) -> list[tuple[int, str]]:
    values = []
    for number, line in _read_txt(path, text, columns):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DitqError(f"{path}: line {number} is not JSON ({error})") from error
        key = next((name for name in columns if isinstance(entry, dict) and name in entry), None)
        if key is None:
            raise DitqError(f"{path}: line {number} is not a JSON object with the key {' or '.join(columns)}")
        value = entry[key]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DitqError(f"{path}: line {number}: '{key}' is {json.dumps(value)[:40]}; give a text")
        values.append((number, str(value)))
    return values
