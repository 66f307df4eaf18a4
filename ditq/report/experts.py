"""The report's section on mixtures of experts: who answers which tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditq.report import plots
from ditq.report.page import number, text

SHOWN = 6  # feed-forwards that are drawn, evenly from all


def experts(reports: Sequence[Mapping[str, Any]]) -> str:
    """Loads after the last pass that measured them; nothing where there are no experts."""
    loads = [[row for row in report.get("rows", []) if row.get("load by step")] for report in reports]
    rows: list[Any] = next((found for found in reversed(loads) if found), [])
    shown = ""
    for place, row in enumerate(rows[:: max(1, -(-len(rows) // SHOWN))], start=1):
        drawn = plots.expert_loads(row["load by step"], row["load by place"], f"experts{place}")
        shown += (
            f'<h3>{text(row["feed-forward"])}</h3><div class="wide">{drawn}</div>'
            f"<p>An expert gets {number(100 * row['least load'], '.1f')} to {number(100 * row['most load'], '.1f')} % "
            f"of the tokens; {number(100 * row['dropped'], '.1f')} % of what tokens asked for found no slot.</p>"
        )
    if not shown:
        return ""
    return (
        "<p>The share of the tokens that each expert answers, by part of the steps from the first on, and by place among the "
        "tokens of a sample.</p>" + shown
    )
