"""What a budget found, beside the engine: budget.json with every number and budget.png with the front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ditq.report import plots
from ditq.report.evaluation import plain


def write_budget(engine: Path, report: Mapping[str, Any]) -> None:
    """Write both files into an engine's folder; `report` is the budget's entry in the engine's reports."""
    beside = engine / ".budget.json.partial"
    beside.write_text(json.dumps(plain(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(engine / "budget.json")
    plots.write_budget_front(report["front"], engine / "budget.png")


def front_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The front as (header, rows) for the terminal; the chosen one is marked."""
    if "weights, bytes" not in report["front"][0]:
        return _attention_table(report["front"])
    header = ["", "weights, MB", "bits a weight", "predicted, dB", "measured, dB", "PSNR, dB", "linears"]
    rows = [
        [
            ">" if point["chosen"] else "",
            f"{point['weights, bytes'] / 1e6:.2f}",
            f"{point['bits a weight']:.2f}",
            *("" if point[key] is None else f"{point[key]:.1f}"
              for key in ("predicted error, dB", "measured error, dB", "PSNR, dB")),
            point["linears"],
        ]
        for point in report["front"]
    ]  # fmt: skip
    return header, rows


def _attention_table(front: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    levels = ("predicted error, dB", "measured error, dB")
    rows = [
        [
            ">" if point["chosen"] else "",
            f"{next(iter(point.values())):.3f}",
            *("" if point[key] is None else f"{point[key]:.1f}" for key in levels),
            point["attentions"],
        ]
        for point in front
    ]
    return ["", "multiply-adds", "predicted, dB", "measured, dB", "attentions"], rows
