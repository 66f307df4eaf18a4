"""One HTML file and one JSON file from an evaluation: everything inside, nothing fetched, at most 5 MB."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ditq.errors import DitqError
from ditq.report import sections
from ditq.report.evaluation import Evaluation, plain
from ditq.report.experts import experts
from ditq.report.measure import Sizes
from ditq.report.page import document

LARGEST = 5_000_000  # bytes of the HTML file
# (pictures, rows of each table) to show: the first that keeps the page under LARGEST is taken.
AMOUNTS = ((16, 600), (8, 200), (4, 60), (2, 20), (0, 10))


def page_of(where: str | Path) -> Path:
    """The page that `write_report` makes there."""
    target = Path(where)
    return target if target.suffix == ".html" else target / "report.html"


def write_report(
    where: str | Path,
    evaluation: Evaluation,
    engine_info: Mapping[str, Any],
    pass_reports: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
) -> Path:
    """Write report.html and report.json into a folder (or NAME.html and NAME.json) and return the page's path.

    Args:
        engine_info: anything to tell of the engine; the keys "sizes" (measure.Sizes), "speed" (measure.Speed),
            "speed_reference" (one of its names) and "memory" (name -> measure.Memory) have their own tables.
        pass_reports: what each pass told (`PassReport.to_json`): "pass" is its name, lists of mappings become tables.
        recipe: the resolved recipe (`Recipe.to_json`).

    Both files are written beside their places first and then renamed, so that an old report is never left half
    replaced. Raises DitqError where they cannot be written.
    """
    page = page_of(where)
    values = {
        "evaluation": json.loads(evaluation.to_json()),
        "engine": plain(_with_ratios(engine_info)),
        "passes": plain(list(pass_reports)),
        "recipe": plain(recipe),
    }
    contents = {
        page.with_suffix(".json"): json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False),
        page: render(evaluation, engine_info, pass_reports, recipe),
    }
    written: list[tuple[Path, Path]] = []
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
            written.append((beside, path))
            beside.write_text(content, encoding="utf-8")
        for beside, path in written:
            beside.replace(path)
    except OSError as error:
        raise DitqError(f"{page}: the report cannot be written ({error.strerror}); choose another place") from error
    finally:
        for beside, _ in written:
            beside.unlink(missing_ok=True)
    return page


def render(
    evaluation: Evaluation,
    engine_info: Mapping[str, Any],
    pass_reports: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
) -> str:
    """The page as text, under 5 MB: with fewer pictures and shorter tables where there is too much of them."""
    size = 0
    lead, cost = sections.lead(evaluation, engine_info), sections.cost(engine_info)
    steps, charts = sections.steps(evaluation), sections.layer_charts(evaluation)
    histograms, distilled = sections.histograms(evaluation), sections.distillation(pass_reports)
    routed = experts(pass_reports)
    for pictures, rows in AMOUNTS:
        parts = [
            ("pictures", "Pictures", sections.pictures(evaluation, pictures)),
            ("quality", "Quality by prompt", sections.quality(evaluation, rows)),
            ("steps", "Error by denoising step", steps),
            ("layers", "Error by layer", sections.layers(evaluation, pass_reports, charts, rows)),
            ("histograms", "Weights and activations", histograms),
            ("cost", "Size, memory and speed", cost),
            ("budget", "Size against error", sections.budget(pass_reports)),
            ("learning", "Distillation", distilled),
            ("experts", "Experts", routed),
            ("passes", "What each pass did", sections.passes(pass_reports, rows)),
            ("recipe", "Recipe", sections.recipe(recipe)),
            ("measured", "How it was measured", sections.measured(evaluation)),
        ]
        page = document(f"ditq report: {evaluation.engine}", parts, lead)
        size = len(page.encode())
        if size <= LARGEST:
            return page
    raise DitqError(f"the report has {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f} MB; evaluate fewer prompts")


def _with_ratios(engine_info: Mapping[str, Any]) -> dict[str, Any]:
    """engine_info with the ratios that its measurements only compute."""
    values = dict(engine_info)
    sizes = values.get("sizes")
    if isinstance(sizes, Sizes):
        values["size_ratio_to_fp32"], values["size_ratio_to_bf16"] = sizes.ratio_to_fp32, sizes.ratio_to_bf16
    rows = sections.speeds(engine_info)
    if rows:
        values["speed_table"] = rows
    return values
