"""Prompt files: what they may look like, and that every mistake in one is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditq.calibration.prompts import builtin_prompts, check_prompts, read_labels, read_prompts, spread
from ditq.errors import DitqError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a red apple\na dog, running\n"),
        ("p.txt", "\ufeffa red apple\r\na dog, running"),
        ("p.csv", 'id,Prompt\n1,a red apple\n2,"a dog, running"\n'),
        ("p.csv", 'caption,id\na red apple,1\n"a dog, running",2\n'),
        ("p.csv", 'a red apple\n"a dog, running"\n'),
        ("p.jsonl", '{"text": "a red apple"}\n{"text": "a dog, running", "id": 2}\n'),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str, content: str) -> None:
    assert read_prompts(write(tmp_path, name, content)) == ["a red apple", "a dog, running"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", "no prompts"),
        ("p.csv", "prompt\n", "no prompts"),
        ("p.txt", "a\n\nb\n", "line 2 is empty"),
        ("p.txt", "a\n   \n", "line 2 is empty"),
        ("p.csv", "prompt,id\na,1\n,2\n", "line 3 is empty"),
        ("p.txt", "a\n" + "x" * 10_000, "line 2 has 10,000 characters"),
        ("p.txt", b"a\nb\xff\n", "line 2 is not UTF-8"),
        ("p.csv", "id,words\n1,a\n", "no column is called prompt, caption, text"),
        ("p.csv", "prompt,id\na, b,1\n", "line 2 has 3 columns"),
        ("p.csv", 'prompt\n"a', "line 2: not a valid CSV line"),
        ("p.jsonl", '{"prompt": "a"}\nb\n', "line 2 is not JSON"),
        ("p.jsonl", '{"words": "a"}\n', "line 1 is not a JSON object with the key"),
        ("p.jsonl", '["a"]\n', "line 1 is not a JSON object with the key"),
        ("p.jsonl", '{"prompt": ["a"]}\n', "give a text"),
        (
            "p.jsonl",
            '{"prompt": "a \\ud800 face"}\n',
            "line 1 holds half a character, 'a \\ud800 face'; write it as UTF-8",
        ),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("p.json", "[]", "read from .txt, .csv, .jsonl files"),
    ],
)
def test_every_mistake_in_a_file_is_named_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DitqError) as caught:
        read_prompts(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for path in (tmp_path / "none.txt", tmp_path / "folder.txt"):
        with pytest.raises(DitqError, match="cannot be read"):
            read_prompts(path)


def test_the_longest_prompt_is_accepted(tmp_path: Path) -> None:
    assert len(read_prompts(write(tmp_path, "p.txt", "x" * 9_999))[0]) == 9_999


def test_labels_are_whole_numbers(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, "l.txt", "3\n 7\n999\n")) == [3, 7, 999]
    assert read_labels(write(tmp_path, "l.jsonl", '{"label": 3}\n{"class": 7}\n')) == [3, 7]
    for wrong in ("-1", "1.5", "dog", "²"):
        with pytest.raises(DitqError, match=r"line 1: .* is not a class label"):
            read_labels(write(tmp_path, "l.txt", wrong))


def test_the_prompt_sets_that_come_with_ditq_are_whole() -> None:
    assert {name: len(set(builtin_prompts(name))) for name in ("vbench", "mini", "mini-heldout")} == {
        "vbench": 944,
        "mini": 128,
        "mini-heldout": 64,
    }
    assert not set(builtin_prompts("mini")) & set(builtin_prompts("mini-heldout"))
    with pytest.raises(DitqError, match="no prompt set is called 'coco'; there are vbench, mini"):
        builtin_prompts("coco")


def test_a_set_is_read_by_its_name_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()  # a checkpoint's folder
    assert read_prompts("mini") == builtin_prompts("mini")
    (tmp_path / "vbench").write_text("a red apple")
    for neither in ("coco", "vbench"):
        with pytest.raises(DitqError, match="prompts are read from"):
            read_prompts(neither)


def test_prompts_given_as_a_list_are_checked_alike() -> None:
    check_prompts(["a", "b"])
    for wrong in ([], ["a", " "], ["x" * 10_000], ["a \udcff"], [3]):
        with pytest.raises(DitqError):
            check_prompts(wrong)  # type: ignore[arg-type]


def test_spreading_keeps_order_and_reaches_over_the_whole_list() -> None:
    assert spread(range(1000), 4) == [0, 250, 500, 750]
    assert spread("abc", 5) == ["a", "b", "c"]
