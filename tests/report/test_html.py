"""The report's page: self-contained, escaped, small, and whole whatever is missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ditq.errors import DitqError
from ditq.passes import passes
from ditq.report.evaluation import Evaluation, Histogram, PromptResult, SiteHistograms, SiteResult, StepResult
from ditq.report.html import LARGEST, render, write_report
from ditq.report.measure import Memory, Sizes, Speed, Timing
from ditq.report.sections import rule_for, verdict

HOSTILE = "</title></script><script>alert(1)</script><img src=http://x.invalid/a onerror=\"b()\"> & 'q' \\1 $a$"


class Page(HTMLParser):
    """Collects every tag, every attribute that may fetch something, and the text."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
                self.references.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words += data


def picture(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def evaluation(prompts: int = 2, sites: int = 3, size: int = 64, caption: str = HOSTILE) -> Evaluation:
    histogram = Histogram(3.0, 1.0, [0, 3, 10, 3, 0])
    return Evaluation(
        checkpoint=HOSTILE,
        engine=HOSTILE,
        arguments={"negative_prompt": HOSTILE},
        seed=0,
        prompts=[
            PromptResult(f"{caption} {i}", i, 20.0 + i, 0.9, 0.01, None, 0.1, [HOSTILE] if i == 0 else [])
            for i in range(prompts)
        ],
        steps=[StepResult(i, 1000.0 - i, 0.01, 0.02, 0.0) for i in range(2)],
        sites=[SiteResult(f"{HOSTILE}.{i}", "w4a8 uniform", "query", 10, 10.0 + i, 12.0) for i in range(sites)],
        histograms=[SiteHistograms(HOSTILE, histogram, histogram, histogram, histogram)] if sites else [],
        notes=[HOSTILE],
        environment={"machine": HOSTILE},
        pictures=[(picture(2 * i, size), picture(2 * i + 1, size)) for i in range(prompts)],
    )


ENGINE = {
    "sizes": Sizes({HOSTILE: 100}, 400, 1000, 2000, 1000, 500),
    "speed": Speed({"engine": Timing([1.0, 2.0, 3.0]), "float": Timing([2.0, 4.0, 6.0])}, HOSTILE),
    "speed_reference": "float",
    "memory": {HOSTILE: Memory(10_000_000, 20_000_000)},
    HOSTILE: HOSTILE,
}
PASSES = [
    {
        "pass": HOSTILE,
        "settings": {HOSTILE: HOSTILE},
        "rows": [{"site": f"{HOSTILE}.0", "output error": 0.01, HOSTILE: HOSTILE}, {"site": "b", "only here": None}],
        "summary": {"linears": 2, "lowest": math.inf},
    }
]
RECIPE = {"name": HOSTILE, "passes": [{"quantize": {"format": "w4a8"}}]}


def check(page: str) -> Page:
    """The promises that hold for every page."""
    found = Page(page)
    assert found.open == []
    assert found.tags.count("script") == 1 and found.handlers == []
    for reference in found.references:
        assert reference.startswith(("data:image/", "#")), reference
    for address in re.findall(r"url\(([^)]*)\)", page):
        assert address.startswith("#"), address
    assert "@import" not in page and "<link" not in page and "<iframe" not in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]*)', page):
        assert target in ids
    assert len(page.encode()) <= LARGEST
    return found


@pytest.fixture(scope="module")
def page() -> str:
    return render(evaluation(), ENGINE, PASSES, RECIPE)


def test_the_page_fetches_nothing_and_is_well_formed(page: str) -> None:
    found = check(page)
    assert found.tags.count("img") == 6 and found.tags.count("svg") == 5
    # Nothing but the captions' own text names an address.
    assert re.sub(r"http://x\.invalid", "", page).count("http") == page.count("http-equiv")


def test_hostile_captions_are_shown_as_text(page: str) -> None:
    found = Page(page)
    assert f"{HOSTILE} 0" in found.words  # in the quality table
    assert HOSTILE[-44 + 3 :] + ".0" in found.words  # a layer's name in a chart, cut at the left
    assert "<script>alert" not in page and "<img src=http" not in page


def test_every_section_is_there(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Pictures", "Quality by prompt", "Error by denoising step", "Error by layer", "Weights and activations",
        "Size, memory and speed", "What each pass did", "Recipe", "How it was measured",
    ]  # fmt: skip
    words = Page(page).words
    assert "mean PSNR 20.5 dB, worst 20.0 dB" in words
    assert "0.200 of the fp32 transformer" in words and "2.00×" in words
    assert "only here" in words
    # An output error of 0.01 is 20 dB.
    assert '<td class="n" data-v="20.0">20.0</td>' in page


def test_each_distillation_is_drawn_with_what_became_of_it() -> None:
    curves = [
        {"step": 1, "output": 0.1, "features": 0.2, "balance": 0.0},
        {"step": 2, "output": 0.05, "features": 0.1, "balance": 0.0},
    ]
    summary = {"error before, dB": -5.0, "error after, dB": -8.25, "kept": True}
    held_out = [{"step": 0, "error, dB": -5.0}, {"step": 2, "error, dB": -8.25}]
    report = {"pass": "distill", "settings": {}, "summary": summary, "curves": curves, "held out": held_out}
    found = render(evaluation(), {}, [report, {**report, "summary": {**summary, "kept": False}}], {})
    assert check(found).tags.count("svg") == 7 - 1  # two more, and no sizes
    words = Page(found).words
    assert "from -5.0 dB to -8.2 dB, kept." in words and "not kept, since it was no better" in words


def test_experts_are_drawn_as_the_last_pass_left_them() -> None:
    row = {"feed-forward": "block.0.ff", "least load": 0.1, "most load": 0.253, "dropped": 0.04,
           "load by step": [[0.5, 0.5], [0.2, 0.8]], "load by place": [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]}  # fmt: skip
    first = {"pass": "moe", "settings": {}, "summary": {}, "rows": [{**row, "most load": 0.9}]}
    found = render(evaluation(), {}, [first, {**first, "pass": "distill", "rows": [row]}], {})
    page = check(found)
    assert "An expert gets 10.0 to 25.3 % of the tokens; 4.0 % of what tokens asked for" in page.words
    assert page.tags.count("svg") == check(render(evaluation(), {}, [], {})).tags.count("svg") + 1


@pytest.mark.parametrize(
    ("prompts", "sites", "engine", "reports", "recipe"),
    [(1, 0, {}, [], {}), (0, 0, {}, [], {}), (1, 1, ENGINE, PASSES, RECIPE)],
)
def test_missing_parts_leave_a_whole_page(
    prompts: int, sites: int, engine: dict[str, Any], reports: list[dict[str, Any]], recipe: dict[str, Any]
) -> None:
    found = check(render(evaluation(prompts, sites), engine, reports, recipe))
    assert "How it was measured" in found.words


def test_identical_models_and_infinite_numbers_are_drawn() -> None:
    same = evaluation(1, 2)
    same.prompts = [PromptResult("a", 0, math.inf, 1.0, 0.0, 0.0, 0.0)]
    same.steps = [StepResult(0, 1000.0, 0.0, 0.0, 0.0)]
    same.sites = [SiteResult("a", "w8a8", "", 1, math.inf), SiteResult("b", "w8a8", "", 1, -math.inf)]
    found = check(render(same, {}, [], {}))
    assert "exactly the pictures of the original" in found.words


def test_a_report_with_too_much_in_it_stays_under_the_limit() -> None:
    rows = [{"site": f"block.{i}.{'x' * 60}", "a": "y" * 100, "b": "z" * 100, "c": i} for i in range(4000)]
    page = render(
        evaluation(40, 700, size=512, caption="long " * 1900),
        ENGINE,
        [{"pass": f"p{i}", "rows": rows} for i in range(5)],
        {},
    )
    found = check(page)
    assert found.tags.count("img") >= 3
    assert "more are in the JSON file" in found.words


def test_the_files_hold_the_same_evaluation(tmp_path: Path) -> None:
    found = evaluation(1, 1)
    path = write_report(tmp_path / "new", found, ENGINE, PASSES, RECIPE)
    assert path == tmp_path / "new" / "report.html"
    values = json.loads((tmp_path / "new" / "report.json").read_text())
    assert Evaluation.from_json(json.dumps(values["evaluation"])) == found
    assert values["engine"]["size_ratio_to_fp32"] == 0.2
    assert values["engine"]["speed_table"][0]["times_as_fast"] == 2.0
    assert values["passes"][0]["summary"]["lowest"] == "inf"
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]
    assert write_report(tmp_path / "other.html", found, {}, [], {}) == tmp_path / "other.html"
    assert (tmp_path / "other.json").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluation(1, 0)
    (tmp_path / "report.html").write_text("old")
    write = Path.write_text

    def full(self: Path, content: str, **named: Any) -> int:
        if ".html" in self.name:
            write(self, content[:10], **named)
            raise OSError(28, "No space left on device")
        return write(self, content, **named)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DitqError, match="cannot be written \\(No space left on device\\)"):
        write_report(tmp_path, found, {}, [], {})
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("w4a8 twin_log_shared", {"format": "w8a8"}),
        ("w4a16 uniform", {"format": "w8a16"}),
        ("w4a4 uniform", {"format": "w8a8"}),
        ("w8a8 uniform", {"keep": True}),
    ],
)
def test_the_suggested_rule_is_one_that_a_recipe_takes(stored: str, expected: dict[str, Any]) -> None:
    (rule,) = yaml.safe_load(rule_for(SiteResult("transformer_blocks.0.ff.net.2", stored, "", 1, 10.0)))
    assert rule == {"select": "transformer_blocks.0.ff.net.2", **expected}
    quantize: Any = passes()["quantize"]
    quantize(rules=[rule]).check()


def test_the_verdict_follows_the_mean_psnr() -> None:
    found = evaluation(1, 0)
    for psnr, words in (
        (45.0, "as far as an eye can tell"),
        (31.0, "small differences"),
        (25.0, "visible"),
        (3.0, "clearly"),
    ):
        found.prompts = [PromptResult("a", 0, psnr, 0.9, 10 ** (-psnr / 10), None, 0.1)]
        assert words in verdict(found, {})
