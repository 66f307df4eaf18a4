"""The plot of what attention costs: there is a line for everything that the tool measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench_linear_attention import ENGINES, FORMS, draw, exponent


def test_every_form_has_a_line(tmp_path: Path) -> None:
    times = {1024: 1.0, 4096: 4.0}
    draw({(engine, 64, form): times for engine in ENGINES for form in FORMS}, tmp_path / "cost.svg")
    drawn = (tmp_path / "cost.svg").read_text(encoding="utf-8")
    assert all(form in drawn for form in FORMS)


def test_the_exponent_is_that_of_the_times_from_1024_tokens_on() -> None:
    assert exponent({256: 50.0, 1024: 1.0, 4096: 16.0, 16384: 256.0}) == pytest.approx(2)
