"""The report's charts as small inline SVGs in the page's own colour variables, so dark mode and print recolour them.

The series colours follow Okabe and Ito, "Color Universal Design", 2008, which are told apart with any colour vision;
line styles and markers differ as well.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ditq.report.evaluation import Histogram, SiteHistograms, SiteResult, StepResult

WIDTH = 9.8  # inches of 72 SVG units: about one unit a pixel at 700 pixels
WORST_SHOWN = 24

# Placeholder -> the page's variable. The placeholders never leave this file.
INK, FAINT, PAPER = "#101010", "#c0c0c0", "#fefefe"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
VARIABLES = {
    INK: "ink",
    FAINT: "rule",
    PAPER: "paper",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PURPLE: "purple",
}

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ditq",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "axes.unicode_minus": False,
}


def _figure(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one <svg> element for an HTML page: no header, no metadata, no addresses, its own ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", _opening(description), text, count=1, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", text)


def _opening(description: str) -> str:
    quoted = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\\", "")
    return rf'<svg class="chart" viewBox="\1" role="img" aria-label="{quoted}" stroke-linejoin="round">'


def step_errors(steps: Sequence[StepResult]) -> str:
    """Relative error by denoising step: on the original's inputs, on the engine's own trajectory, of the latents, and what
    each step alone does to the last ones.
    """
    with rc_context(STYLE):
        figure, (axes,) = _figure(3.2)
        probed = [result for result in steps if result.effect is not None]
        series = [
            ("denoiser, on its own trajectory", steps, [r.accumulated for r in steps], ORANGE, "-", "o"),
            ("denoiser, on the original's inputs", steps, [r.forced for r in steps], BLUE, "--", "s"),
            ("latents after the step", steps, [r.latents for r in steps], GREEN, ":", "^"),
        ]
        if probed:
            effects = [r.effect or 0.0 for r in probed]
            series.append(("last latents, by this step alone", probed, effects, PURPLE, "-.", "D"))
        for label, results, values, color, line, marker in series:
            shown = [value if math.isfinite(value) else math.nan for value in values]
            numbers = [result.step + 1 for result in results]
            axes.plot(numbers, shown, line, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=label)
        if any(0 < value < math.inf for _, _, values, *_ in series for value in values):
            axes.set_yscale("log")
        axes.set_xlabel("denoising step")
        axes.set_ylabel("relative error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        columns = 2 if probed else 3
        figure.legend(loc="outside upper left", ncols=columns, handlelength=2.6, columnspacing=1.4, fontsize=10.5)
        return _svg(figure, "steps", "Relative error by denoising step")


def worst_sites(sites: Sequence[SiteResult], shown: int = WORST_SHOWN) -> str:
    """Horizontal bars of the layers with the lowest signal-to-noise ratio, worst first."""
    ranked = sorted(sites, key=lambda result: result.sqnr_db)[:shown]
    values = [_drawable(result.sqnr_db) for result in ranked]
    with rc_context(STYLE):
        figure, (axes,) = _figure(1.1 + 0.215 * len(ranked))
        places = np.arange(len(ranked))
        axes.barh(places, values, height=0.72, color=ORANGE)
        reach = max([*values, *(_drawable(r.local_db) for r in ranked if r.local_db is not None), 1e-9])
        for place, value, result in zip(places, values, ranked, strict=True):
            inside = value > 0.08 * reach
            axes.annotate(
                f"{result.sqnr_db:.1f}",
                (max(value, 0.0), place),
                (-4 if inside else 4, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                fontsize=9.5,
                color=PAPER if inside else INK,
            )
        alone = [(place, r.local_db) for place, r in zip(places, ranked, strict=True) if r.local_db is not None]
        if alone:
            axes.plot(
                [_drawable(value) for _, value in alone],
                [place for place, _ in alone],
                "D",
                color=BLUE,
                markersize=4,
                label="the layer alone",
            )
            figure.legend(loc="outside upper right", fontsize=10.5)
        axes.set_yticks(places, [_shortened(result.site) for result in ranked], fontsize=10)
        axes.set_ylim(len(ranked) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("SQNR of the output, dB (longer is better)")
        axes.grid(axis="x")
        return _svg(figure, "worst", "Signal-to-quantization-noise ratio of the worst layers")


def sites_in_order(sites: Sequence[SiteResult]) -> str:
    """The signal-to-noise ratio of every layer in the order of the model: where error comes in and how it adds up."""
    with rc_context(STYLE):
        figure, (axes,) = _figure(2.5)
        places = np.arange(1, len(sites) + 1)
        axes.plot(places, [_drawable(r.sqnr_db) for r in sites], color=FAINT, linewidth=0.8, zorder=1)
        axes.plot(places, [_drawable(r.sqnr_db) for r in sites], "o", color=ORANGE, markersize=3.2)
        axes.set_xlabel("layer, in the order of the model")
        axes.set_ylabel("SQNR, dB")
        axes.grid(axis="y")
        return _svg(figure, "order", "Signal-to-quantization-noise ratio of every layer in model order")


def histograms(shown: SiteHistograms, name: str) -> str:
    """Density of the weights and of the inputs of one layer before and after, in units of their own RMS."""
    with rc_context(STYLE):
        figure, panels = _figure(2.3, columns=2)
        pairs = (
            ("weights", shown.weight_before, shown.weight_after),
            ("inputs", shown.input_before, shown.input_after),
        )
        for axes, (what, before, after) in zip(panels, pairs, strict=True):
            # A stair cannot fall to zero on a logarithmic axis: empty bins end half a decade below the rarest value.
            densities = [_density(before), _density(after)]
            floor = min(density[density > 0].min(initial=1.0) for _, density in densities) / 3
            for (edges, density), color, label in zip(
                densities, (BLUE, ORANGE), ("original", "as quantized"), strict=True
            ):
                filled = color == BLUE
                axes.stairs(
                    np.maximum(density, floor),
                    edges,
                    baseline=floor,
                    color=color,
                    fill=filled,
                    alpha=0.45 if filled else 1.0,
                    linewidth=1.4,
                    label=label,
                )
            axes.set_yscale("log")
            axes.set_title(what)
            axes.set_xlabel("value / RMS")
            axes.tick_params(axis="y", labelleft=False, which="both", length=0)
            axes.grid(axis="x")
        panels[1].legend(loc="upper right", fontsize=10.5)
        return _svg(figure, name, f"Weights and inputs of {shown.site} before and after")


def bars(values: Mapping[str, float], unit: str, name: str, description: str) -> str:
    """A few horizontal bars with their numbers; the last one is the engine's and stands out."""
    with rc_context(STYLE):
        figure, (axes,) = _figure(0.25 + 0.33 * len(values))
        places = np.arange(len(values))
        colors = [BLUE] * (len(values) - 1) + [ORANGE]
        axes.barh(places, list(values.values()), height=0.66, color=colors)
        for place, value in zip(places, values.values(), strict=True):
            axes.annotate(
                f"{value:,.3g} {unit}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=10.5
            )
        axes.set_yticks(places, list(values))
        axes.invert_yaxis()
        axes.set_xlim(0, max(values.values()) * 1.18 or 1)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, name, description)


def budget_front(points: Sequence[Mapping[str, Any]]) -> str:
    """Size against error of a budget's front (`front` in the report of the budget): predicted, measured, PSNR, the choice."""
    with rc_context(STYLE):
        return _svg(_front_figure(points), "budget", f"{_size_of(points[0])[0]} against the denoiser's error")


def write_budget_front(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The same as a PNG, written beside its place and then renamed."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with rc_context(STYLE):
            _front_figure(points).savefig(beside, format="png", dpi=120, facecolor="white")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _front_figure(points: Sequence[Mapping[str, Any]]) -> Figure:
    drawn = [point for point in points if point.get("PSNR, dB") is not None]
    figure, panels = _figure(3.4, columns=2 if drawn else 1)
    sizes = [_size_of(point)[1] for point in points]
    errors = "predicted error, dB"
    panels[0].plot(
        sizes, [point[errors] for point in points], "-", color=BLUE, marker="o", markersize=3, label="predicted"
    )
    found = [point for point in points if point["measured error, dB"] is not None]
    panels[0].plot([_size_of(point)[1] for point in found], [point["measured error, dB"] for point in found],
                   "D", color=ORANGE, markersize=5, label="measured")  # fmt: skip
    panels[0].set_ylabel("error, dB")
    if drawn:
        panels[1].plot([_size_of(point)[1] for point in drawn], [point["PSNR, dB"] for point in drawn], "o-",
                       color=GREEN, markersize=4, label="PSNR of pictures")  # fmt: skip
        panels[1].set_ylabel("PSNR, dB")
    for axes, value in zip(panels, (errors, "PSNR, dB"), strict=False):
        for point in points:
            if point["chosen"] and point.get(value) is not None:
                axes.plot([_size_of(point)[1]], [point[value]], "s", color=PURPLE, markersize=10,
                          fillstyle="none", label="chosen")  # fmt: skip
        axes.set_xlabel(_size_of(points[0])[0])
        axes.grid()
        axes.legend(loc="best", fontsize=10.5)
    return figure


def _size_of(point: Mapping[str, Any]) -> tuple[str, float]:
    """What a point of a front takes, of weights or of attention: what it is, and how much."""
    if "weights, bytes" in point:
        return "weights, MB", point["weights, bytes"] / 1e6
    name, share = next(iter(point.items()))
    return name, share


def learning(curves: Sequence[Mapping[str, float]], held_out: Sequence[Mapping[str, float]], name: str) -> str:
    """Losses by step, and the denoiser's error on held-out calls, of one distillation (`curves`, `held out` in its report)."""
    with rc_context(STYLE):
        figure, (losses, errors) = _figure(2.9, columns=2)
        steps = [point["step"] for point in curves]
        for key, label, color, line in (
            ("output", "answers", ORANGE, "-"),
            ("features", "blocks' outputs", BLUE, "--"),
            ("balance", "what parts ask for", GREEN, ":"),
        ):
            values = [point[key] if point[key] > 0 else math.nan for point in curves]
            if any(math.isfinite(value) for value in values):
                losses.plot(steps, values, line, color=color, linewidth=1.4, label=label)
        if losses.lines:
            losses.set_yscale("log")
            losses.legend(loc="best", fontsize=10.5)
        losses.set_ylabel("relative error")
        judged = sorted(held_out, key=lambda point: point["step"])
        errors.plot([point["step"] for point in judged], [point["error, dB"] for point in judged], "o-", color=PURPLE,
                    markersize=4, linewidth=1.4)  # fmt: skip
        errors.set_ylabel("error on held-out calls, dB")
        for axes in (losses, errors):
            axes.set_xlabel("step")
            axes.grid()
        return _svg(figure, name, "Losses and held-out error of the distillation by step")


def expert_loads(by_step: Sequence[Sequence[float]], by_place: Sequence[Sequence[float]], name: str) -> str:
    """Shares of the tokens that each expert answers: by bin of steps [bins, E], and by place among the tokens [E, N]."""
    with rc_context(STYLE):
        figure, (steps, places) = _figure(1.9, columns=2)
        shown = ((steps, np.asarray(by_step).T, "part of the steps"), (places, np.asarray(by_place), "token"))
        for axes, values, label in shown:
            if not values.size:
                axes.set_axis_off()
                continue
            axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
            axes.set_title(f"dark: none, bright: {values.max():.0%}")
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        steps.set_ylabel("expert")
        return _svg(figure, name, "Shares of the tokens that each expert answers, by step and by place")


def _density(shown: Histogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges in units of the RMS [bins + 1] and density [bins]."""
    counts = np.asarray(shown.counts, dtype=np.float64)
    reach = shown.absmax / (shown.rms or 1.0) or 1.0
    edges = np.linspace(-reach, reach, len(counts) + 1)
    return edges, counts / (counts.sum() or 1.0) / np.diff(edges)


def _drawable(value: float) -> float:
    """Infinite ratios are drawn at 150 dB, beyond what float32 can tell apart."""
    return min(max(value, -20.0), 150.0) if not math.isnan(value) else 0.0


def _shortened(name: str, limit: int = 44) -> str:
    shown = name if len(name) <= limit else f"…{name[-limit + 1 :]}"
    return shown.replace("$", r"\$")  # matplotlib reads what stands between two dollars as a formula
