"""The sections of the report's page, each as a piece of HTML; empty where there is nothing to show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from PIL.Image import Image

from ditq.report import measure, plots
from ditq.report.evaluation import METRICS, Evaluation, Histogram, PromptResult, SiteResult, plain
from ditq.report.metrics import decibels
from ditq.report.page import Code, Number, cut, megabytes, number, pairs, table, text
from ditq.report.pictures import SMALLEST, data_address, difference

WORST = 10
# Mean PSNR from which these words are used; a rule of thumb for the sentence on top, not a measurement.
WORDS = (
    (40.0, "the same pictures, as far as an eye can tell"),
    (30.0, "the same pictures with small differences in detail"),
    (24.0, "similar pictures with visible differences"),
    (-math.inf, "clearly different pictures"),
)
Reports = Sequence[Mapping[str, Any]]


def lead(evaluation: Evaluation, engine_info: Mapping[str, Any]) -> str:
    """What stands before the first section: the verdict, plain defects, the key numbers, what was not measured."""
    summary = evaluation.summary
    tiles = [
        (number(summary[name], form), label)
        for name, label, form in (
            ("psnr", "mean PSNR, dB", ".1f"),
            ("psnr_worst", "worst PSNR, dB", ".1f"),
            ("ssim", "mean SSIM", ".3f"),
            ("st_lpips", "mean ST-LPIPS", ".3f"),
            ("lite0_fd", "lite0-FD", ".3g"),
            ("step_error", "denoiser's error", ".2g"),
            ("sqnr_worst", "worst layer, dB", ".1f"),
        )
        if summary[name] is not None
    ]
    sizes = engine_info.get("sizes")
    if isinstance(sizes, measure.Sizes):
        tiles.append((f"{sizes.ratio_to_fp32:.3f}", "of the fp32 size"))
    for row in speeds(engine_info):
        if row["name"] == "engine":
            tiles.append((f"{row['times_as_fast']:.2f}×", f"as fast as {engine_info['speed_reference']}"))
    shown = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>' for value, label in tiles)
    warnings = "".join(f'<div class="warning">{text(cut(line))}</div>' for line in evaluation.defects[:20])
    notes = "".join(f'<p class="soft">{text(note)}</p>' for note in evaluation.notes)
    return (
        f"<h1>{text(evaluation.engine)} against {text(evaluation.checkpoint)}</h1>"
        f'<p class="verdict">{text(verdict(evaluation, engine_info))}</p>{warnings}'
        f'<div class="tiles">{shown}</div>{notes}'
    )


def verdict(evaluation: Evaluation, engine_info: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    summary = evaluation.summary
    mean, count = summary["psnr"], len(evaluation.prompts)
    drawn = f"{count} prompt{'s' if count != 1 else ''}"
    if mean is None:
        words = "No prompt was drawn."
    elif mean == math.inf:
        words = f"On {drawn} the engine draws exactly the pictures of the original."
    else:
        found = next(words for least, words in WORDS if mean >= least)
        words = (
            f"On {drawn} the engine draws {found}: mean PSNR {number(mean, '.1f')} dB, worst "
            f"{number(summary['psnr_worst'], '.1f')} dB, mean SSIM {number(summary['ssim'], '.3f')}."
        )
    sizes = engine_info.get("sizes")
    if isinstance(sizes, measure.Sizes):
        words += f" It takes {megabytes(sizes.engine_transformer)}, {sizes.ratio_to_fp32:.3f} of the fp32 transformer."
    return words


def pictures(evaluation: Evaluation, most: int) -> str:
    """The worst prompts and, where not all fit, the best: original, engine, amplified difference."""
    order = sorted(range(len(evaluation.pictures)), key=lambda index: evaluation.prompts[index].psnr)
    if not order or most == 0:
        return ""
    worst = order if len(order) <= most else order[: most * 3 // 4]
    best = [] if len(order) <= most else order[-(most - len(worst)) :]
    groups = [("Worst by PSNR" if best else "All, worst by PSNR first", worst), ("Best", best)]
    intro = "<p>From left to right: original, engine, and |original − engine| × 4 for each colour channel.</p>"
    return intro + "".join(
        f'<h3>{title}</h3><div class="cards">'
        + "".join(_card(evaluation.prompts[index], *evaluation.pictures[index]) for index in chosen)
        + "</div>"
        for title, chosen in groups
        if chosen
    )


def _card(result: PromptResult, original: Image, engine: Image) -> str:
    small = " small" if max(original.size) < SMALLEST else ""
    caption = cut(str(result.condition), 160)
    shown = "".join(
        f'<img src="{data_address(picture)}" alt="{text(f"{who}: {caption}")}">'
        for who, picture in (("original", original), ("engine", engine), ("difference", difference(original, engine)))
    )
    numbers = f"{number(result.psnr, '.1f')} dB, SSIM {number(result.ssim, '.3f')}"
    return (
        f'<figure class="card{small}"><figcaption><span>{text(caption)}</span> '
        f"<span>{numbers}</span></figcaption><div>{shown}</div></figure>"
    )


def quality(evaluation: Evaluation, rows: int) -> str:
    """The means, then one row a prompt."""
    if not evaluation.prompts:
        return ""
    means = [
        (METRICS[name].label, Number(value, ".4g")) for name, value in evaluation.summary.items() if value is not None
    ]
    lines = [
        (
            cut(str(result.condition)),
            Number(result.seed, "d"),
            Number(result.psnr, ".2f"),
            Number(result.ssim, ".4f"),
            Number(result.st_lpips, ".4f"),
            Number(result.latent_error, ".3g"),
        )
        for result in sorted(evaluation.prompts, key=lambda result: result.psnr)[:rows]
    ]
    headings = ("prompt", "seed", "PSNR, dB", "SSIM", "ST-LPIPS", "latent error")
    return (
        table(("", "value"), means, narrow=True)
        + '<p class="hint">Click a heading to sort.</p>'
        + table(headings, lines, sortable=True)
        + _left_out(len(evaluation.prompts), rows)
    )


def steps(evaluation: Evaluation) -> str:
    """The error curves over the denoising steps."""
    if not evaluation.steps:
        return ""
    return (
        "<p>Relative error ‖a − b‖² / ‖a‖². On the original's inputs a step shows what the engine itself does wrong; "
        "on its own trajectory, what it does after its earlier errors have moved the latents. The effect of a step is "
        "the error of the last latents when the original makes the engine's error at this step alone.</p>"
        f'<div class="wide">{plots.step_errors(evaluation.steps)}</div>'
    )


def layer_charts(evaluation: Evaluation) -> str:
    """Bars of the worst layers, and all layers in the order of the model."""
    if not evaluation.sites:
        return ""
    charts = (plots.worst_sites(evaluation.sites), plots.sites_in_order(evaluation.sites))
    return "".join(f'<div class="wide">{chart}</div>' for chart in charts)


def layers(evaluation: Evaluation, reports: Reports, charts: str, rows: int) -> str:
    """The charts, the worst layers with rules that raise their bits, and the table of all."""
    if not evaluation.sites:
        return ""
    rounding = _rounding_errors(reports)
    ranked = sorted(evaluation.sites, key=lambda result: result.sqnr_db)

    def cells(result: SiteResult) -> list[Any]:
        ratios = [result.sqnr_db, result.local_db, rounding.get(result.site)]
        kind = result.kind.replace("_", " ").replace("+", " + ")
        return [Code(result.site), kind, Code(result.format), *(Number(ratio, ".1f") for ratio in ratios)]

    headings = ["layer", "kind", "format", "SQNR, dB", "alone, dB", "rounding, dB"]
    worst = ranked[:WORST]
    rules = "\n".join(["rules:", *(f"  {rule_for(result)}" for result in worst)])
    every = [
        [*cells(result), Number(result.parameters, ",d"), "aligned" if result.aligned else ""]
        for result in ranked[:rows]
    ]
    return (
        "<p>Both models run side by side on the same calls, so a layer's SQNR holds what the layers before it added. "
        "<i>Alone</i>: the layer on the original's input, where that input still has the same basis. <i>Rounding</i>: "
        "its weights alone, as the pass that rounded them measured it on the calibration inputs. <i>Aligned</i>: "
        "an output that a pass has rotated, scaled or shifted, brought back before it was compared.</p>"
        f"{charts}<h3>The {len(worst)} worst</h3>"
        + table(headings, [cells(result) for result in worst], sortable=True)
        + "<p>To give them more bits, add what you want of these to the rules of the recipe's <code>quantize</code> "
        f"pass:</p><pre>{text(rules)}</pre>"
        + f"<details><summary>All {len(evaluation.sites)} layers</summary>"
        + table([*headings, "weights", ""], every, sortable=True)
        + _left_out(len(evaluation.sites), rows)
        + "</details>"
    )


def rule_for(result: SiteResult) -> str:
    """A rule for `quantize` that gives one site 8-bit weights, or leaves it unquantized where it has them already."""
    bits, _, rest = result.format.partition("a")
    activation = rest.split(" ")[0] or "16"
    change = "keep: true" if bits == "w8" else f"format: w8a{max(int(activation), 8)}"
    return f"- {{select: {json.dumps(result.site)}, {change}}}"


def _rounding_errors(reports: Reports) -> dict[str, float]:
    """SQNR in dB of each site's rounded weights on the calibration inputs, where a pass reports an output error."""
    return {
        row["site"]: decibels(row["output error"])
        for report in reports
        for row in report.get("rows", ())
        if "site" in row and isinstance(row.get("output error"), float)
    }


def histograms(evaluation: Evaluation) -> str:
    """Weights and inputs of the chosen sites."""
    parts = [
        f"<h3><code>{text(shown.site)}</code></h3>"
        f'<p class="soft">largest / RMS: weights {_reach(shown.weight_before)} → {_reach(shown.weight_after)}, '
        f"inputs {_reach(shown.input_before)} → {_reach(shown.input_after)}</p>"
        f'<div class="wide">{plots.histograms(shown, f"histogram{index}")}</div>'
        for index, shown in enumerate(evaluation.histograms)
    ]
    intro = (
        "<p>The worst layers of different kinds and the best of all, densities on a logarithmic axis. Filled: the "
        "original. Line: the decoded weights, and the inputs in the basis in which they are quantized. The nearer the "
        "largest value is to the RMS, the finer the steps of a format of the same bits.</p>"
    )
    return intro + "".join(parts) if parts else ""


def _reach(shown: Histogram) -> str:
    return f"{shown.absmax / shown.rms:.1f}" if shown.rms else "0"


def cost(engine_info: Mapping[str, Any]) -> str:
    """Sizes on disk, memory, speed, and whatever else was told of the engine."""
    told = ("sizes", "memory", "speed", "speed_reference")
    others = {name: cut(_one_line(plain(value))) for name, value in engine_info.items() if name not in told}
    return _sizes(engine_info) + _memory(engine_info) + _speed(engine_info) + pairs(others)


def _sizes(engine_info: Mapping[str, Any]) -> str:
    sizes = engine_info.get("sizes")
    if not isinstance(sizes, measure.Sizes):
        return ""
    values = {
        "original, fp32": sizes.original_fp32 / 1e6,
        "original, bf16": sizes.original_bf16 / 1e6,
        "engine": sizes.engine_transformer / 1e6,
    }
    rows = [(Code(name), Number(size, ",d")) for name, size in sizes.engine_files.items()]
    return (
        f'<div class="wide">{plots.bars(values, "MB", "sizes", "Size of the transformer on disk")}</div>'
        f"<p>{sizes.parameters:,} parameters. The engine has {sizes.ratio_to_fp32:.4f} of the fp32 size and "
        f"{sizes.ratio_to_bf16:.4f} of the bf16 size. The original's files have {megabytes(sizes.original_files)}.</p>"
        f"<details><summary>Files of the engine</summary>{table(('file', 'bytes'), rows, narrow=True)}</details>"
    )


def _memory(engine_info: Mapping[str, Any]) -> str:
    memory = engine_info.get("memory") or {}
    rows = [
        (name, Number(value.before / 1e6, ",.0f"), Number(value.peak / 1e6, ",.0f"))
        for name, value in memory.items()
        if isinstance(value, measure.Memory)
    ]
    if not rows:
        return ""
    headings = ("", "after its imports, MB", "peak, MB")
    return "<h3>Resident memory of a fresh process</h3>" + table(headings, rows, narrow=True)


def _speed(engine_info: Mapping[str, Any]) -> str:
    columns = {"median, ms": "median_ms", "fastest, ms": "fastest_ms", "slowest, ms": "slowest_ms"}
    rows = [
        (row["name"], *(Number(row[key], ".2f") for key in columns.values()), Number(row["times_as_fast"], ".2f"))
        for row in speeds(engine_info)
    ]
    if not rows:
        return ""
    reference = text(engine_info["speed_reference"])
    return (
        "<h3>One call of the denoiser</h3>"
        + table(("", *columns, "times as fast"), rows)
        + f'<p class="soft">Timed in turns on one real input; the last column is against {reference}. '
        f"{text(engine_info['speed'].machine)}</p>"
    )


def speeds(engine_info: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """Rows of the speed table; none where no speed was measured."""
    speed, reference = engine_info.get("speed"), engine_info.get("speed_reference")
    if isinstance(speed, measure.Speed) and reference in speed.timings:
        return measure.table(speed, reference)
    return ()


def budget(reports: Reports) -> str:
    """The front that a budget was chosen from; nothing where there was no budget."""
    points = next((report["front"] for report in reports if report.get("front")), None)
    if not points:
        return ""
    headings = list(points[0])
    cells = [[_cell("yes" if point[key] is True else "" if point[key] is False else point[key]) for key in headings]
             for point in points]  # fmt: skip
    return (
        "<p>Formats of linears, or attentions, were chosen for a budget. Each point is of least predicted error at its "
        "size; some were "
        "put into the model as a whole and measured.</p>"
        f'<div class="wide">{plots.budget_front(points)}</div>' + table(headings, cells, sortable=True)
    )


def distillation(reports: Reports) -> str:
    """Losses and held-out errors on the way, of each training; nothing where there was none."""
    shown = ""
    for place, report in enumerate(reports, start=1):
        if not (report.get("curves") and report.get("held out")):
            continue
        drawn = plots.learning(report["curves"], report["held out"], f"learning{place}")
        first, last = report["summary"].get("error before, dB"), report["summary"].get("error after, dB")
        said = "kept" if report["summary"].get("kept") else "not kept, since it was no better"
        shown += (
            f"<h3>Pass {place}: {text(report.get('pass', ''))}</h3>"
            f'<div class="wide">{drawn}</div>'
            f"<p>Held-out calls of conditions that taught nothing: from {number(first, '.1f')} dB to {number(last, '.1f')} dB, "
            f"{said}. Means of neighbouring steps on the left.</p>"
        )
    return shown


def passes(reports: Reports, rows: int) -> str:
    """One block a pass: its settings and figures, and its tables."""
    parts = []
    for place, report in enumerate(reports, start=1):
        told: Mapping[str, Any] = plain(report)
        tables = {name: value for name, value in told.items() if _is_rows(value)}
        facts: dict[str, Any] = {}
        for name, value in told.items():
            if name not in tables and name != "pass" and value not in ([], {}):
                facts.update(value if isinstance(value, Mapping) else {name: value})
        inner = pairs({name: cut(_one_line(value)) for name, value in facts.items()})
        for lines in tables.values():
            headings = list(dict.fromkeys(key for line in lines for key in line))
            cells = [[_cell(line.get(key)) for key in headings] for line in lines[:rows]]
            inner += table(headings, cells, sortable=True) + _left_out(len(lines), rows)
        parts.append(f"<details><summary>{place}. {text(told.get('pass', 'pass'))}</summary>{inner}</details>")
    return "".join(parts)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _one_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Number(value, ".4g" if isinstance(value, float) else ",d")
    return "" if value is None else cut(_one_line(value), 120)


def recipe(values: Mapping[str, Any]) -> str:
    """The resolved recipe as YAML, to be pasted into a file."""
    if not values:
        return ""
    written = yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True, width=110)
    return f"<pre>{text(cut(written, 40_000))}</pre>"


def measured(evaluation: Evaluation) -> str:
    """How the numbers came about."""
    count = len(evaluation.prompts)
    seeds = f"{evaluation.seed} to {evaluation.seed + count - 1}" if count > 1 else str(evaluation.seed)
    facts = {
        "prompts": count,
        "seeds": f"{seeds}, one a prompt; both models start from the same noise",
        "pipeline's arguments": cut(_one_line(plain(evaluation.arguments)), 2000),
        **evaluation.environment,
    }
    return (
        "<p>The checkpoint's own diffusers pipeline drew every prompt twice, once with the original transformer and "
        "once with the engine in its place. PSNR is taken of each pair of 8-bit pictures and then averaged, "
        "identical pairs left out; <i>PSNR of the mean squared error</i> averages first. SSIM: Gaussian window of 11 "
        "pixels, sigma 1.5, each colour channel by itself. The words of the verdict are a rule of thumb by mean PSNR "
        "(40, 30, 24 dB).</p>" + pairs(facts)
    )


def _left_out(count: int, rows: int) -> str:
    return f'<p class="soft">{count - rows} more are in the JSON file.</p>' if count > rows else ""
