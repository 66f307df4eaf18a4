"""Layer output error of rotations and smoothings, on a checkpoint and on a copy with outliers planted in it.

    ditq calibrate mini -o stats --limit 16
    python tools/measure_rotation.py mini --stats stats
    python tools/measure_rotation.py mini --stats stats --which smoothing
    python tools/measure_rotation.py mini --stats stats --planted --smoothing none

Each number is the signal-to-quantization-noise ratio of a layer's output in dB, the mean over all inputs of token linears:
weights by GPTQ, activations a token, on a quarter of the sampled rows that no pass has seen. The signal is the
output without its mean.

Outliers are planted by the fold that smoothing uses, backwards: a tenth of the channels of every modulated input five times as
large, and four channels up to 50 .. 245, two of them by an offset. The model computes the same as before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.parts import NormModulation
from ditq.passes import Context
from ditq.passes.folding import fold_into_consumers, fold_into_feed, plain_linear
from ditq.passes.judging import Judge, Trial
from ditq.recipe import Recipe

MILD, SALIENT = 5.0, (50.0, 110.0, 180.0, 245.0)  # a factor; the largest magnitudes of four channels
ROTATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "values offline only": {"mode": "identity", "online": False},
    "block Hadamard 32": {"mode": "block_hadamard", "block": 32},
    "block Hadamard 64": {"mode": "block_hadamard"},
    "regular Hadamard, blocks of 64": {"mode": "regular"},
    "full Hadamard": {"mode": "hadamard"},
    "outlier, stride": {"mode": "outlier", "permutation": "stride"},
    "outlier, zigzag": {"mode": "outlier", "permutation": "zigzag"},
    "search": {"mode": "search"},
    "search over all kinds, judged with GPTQ": {
        "mode": "search",
        "kinds": ["identity", "block_hadamard", "regular", "hadamard", "outlier"],
        "rounding": "gptq",
    },
    "learned from block 64": {"mode": "learned", "kinds": ["block_hadamard"]},
    "learned from full": {"mode": "learned", "kinds": ["hadamard"]},
    "block 64, heads learned": {"mode": "block_hadamard", "heads": "learned"},
}
SMOOTHINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "centring alone": {"alpha": 0.0},
    "alpha 0.5, absmax": {},
    "alpha 0.5, absmax, not centred": {"centre": False},
    "alpha 0.5, rms": {"salience": "rms"},
    "alpha 0.5, spearman": {"salience": "spearman"},
    "alpha 0.5, extremes": {"salience": "extremes"},
    "alpha searched": {"alpha": "search"},
    "alpha searched, judged with GPTQ": {"alpha": "search", "rounding": "gptq"},
}


def plant(graph: DiTGraph, groups: Mapping[str, InputStatistics], seed: int = 0) -> dict[str, InputStatistics]:
    """Plant outliers in every input that a modulation makes; returns the statistics of the inputs as they are then."""
    changed = dict(groups)
    for number, group in enumerate(graph.groups.values()):
        if group.feed is None or isinstance(group.feed, NormModulation):
            continue
        found = groups[group.name]
        order = torch.randperm(group.width, generator=torch.Generator().manual_seed(seed + number))
        factor, offset = torch.ones(group.width).double(), torch.zeros(group.width).double()
        factor[order[: group.width // 10]] = MILD
        for place, (channel, peak) in enumerate(zip(order[-4:].tolist(), SALIENT, strict=True)):
            largest = float(found.absmax_all[channel])
            if place % 2:
                offset[channel] = -(peak - largest)  # what is subtracted
            else:
                factor[channel] = peak / largest
        fold_into_feed(graph, group.feed, factor, offset)
        fold_into_consumers(graph, group.sites, factor, offset)
        changed[group.name] = found.transformed(factor, offset)
    return changed


def split(groups: Mapping[str, InputStatistics]) -> tuple[dict[str, InputStatistics], dict[str, InputStatistics]]:
    """(with three quarters of the sampled rows, with the other quarter)."""
    seen: dict[str, InputStatistics] = {}
    unseen: dict[str, InputStatistics] = {}
    for name, found in groups.items():
        last = torch.arange(len(found.sample)) % 4 == 3
        for kept, rows in ((seen, ~last), (unseen, last)):
            kept[name] = replace(found, sample=found.sample[rows], sample_bin=found.sample_bin[rows])
    return seen, unseen


class Model:
    """A checkpoint with its statistics, to be changed afresh for each variant."""

    def __init__(self, name: str, stats: Path, planted: bool) -> None:
        self.checkpoint, self.planted = Checkpoint.open(name), planted
        self.statistics = Statistics.open(stats, self.checkpoint.fingerprint())
        self.groups = {group: self.statistics.groups[group] for group in self.statistics.groups}

    def decibels(self, steps: list[Any], formats: tuple[str, ...]) -> tuple[list[float], float]:
        """Mean SQNR of layer outputs after these passes, one for each format, and the online cost in percent."""
        graph = DiTGraph(self.checkpoint.load_model(), example_inputs(self.checkpoint))
        groups = plant(graph, self.groups) if self.planted else self.groups
        seen, unseen = split(groups)
        context = Context(Statistics(seen, self.statistics.sites, self.statistics.metadata))
        recipe = Recipe.from_dict({"passes": [*steps, {"quantize": {}}]}, "measured")
        cost = recipe.passes[0:-1] and sum(step.runtime_cost(graph)[1] for step in recipe.passes[:-1])
        for step in recipe.passes[:-1]:
            step.run(graph, context)
        token = [group for group in graph.groups.values() if graph.sites[group.name].role == "token"]
        found: dict[str, list[float]] = {form: [] for form in formats}
        for group in token:
            trial = replace(
                Trial.of(context.statistics(group.name), [plain_linear(graph, site).weight for site in group.sites]),
                rows=self._rows(unseen[group.name], context, group.name),
            )
            for form in formats:
                error = Judge(form, "twin_log_shared", "gptq").errors(trial, output := trial.output()).mean()
                # over the output's spread about its mean, which no offset of the input changes
                spread = output.double().square().mean(0).sum() / output.double().var(0, correction=0).sum()
                found[form].append(-10 * float((error * spread).log10()))
        macs = sum(site.macs for site in graph.sites.values())
        return [sum(values) / len(values) for values in found.values()], 100 * (cost or 0) / macs

    def _rows(self, unseen: InputStatistics, context: Context, group: str) -> torch.Tensor:
        change = context.change(group)
        return unseen.transformed(change.inverse_scale, change.shift, change.rotations).sample


def variants(which: str, smoothing: str) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    """(name, smooth, rotate): every rotation behind that smoothing, or every smoothing before none and before one rotation."""
    if which == "rotation":
        for name, rotate in ROTATIONS.items():
            yield f"{name} | {smoothing}", SMOOTHINGS[smoothing], rotate
        return
    for name, smooth in SMOOTHINGS.items():
        for rotation in ("none", "block Hadamard 64"):
            yield f"{rotation} | {name}", smooth, ROTATIONS[rotation]


def judged(settings: dict[str, Any] | None, form: str) -> dict[str, Any] | None:
    """The settings, judging by that format where something is searched or learned."""
    searches = settings and ("search" in settings.values() or "learned" in settings.values())
    return {**settings, "format": form} if settings and searches else settings


def steps_of(smooth: dict[str, Any] | None, rotate: dict[str, Any] | None, form: str) -> list[Any]:
    smooth, rotate = judged(smooth, form), judged(rotate, form)
    if smooth and smooth.get("alpha") == "search" and rotate is None:
        smooth = {**smooth, "rotation": "identity"}
    steps: list[Any] = [] if smooth is None else [{"smooth": smooth}]
    return steps if rotate is None else [*steps, {"rotate": rotate}]


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--stats", required=True, type=click.Path(path_type=Path, exists=True), help="Of `ditq calibrate`.")
@click.option("--planted", is_flag=True, help="Measure a copy with planted outliers.")
@click.option("--which", type=click.Choice(["rotation", "smoothing"]), default="rotation", show_default=True)
@click.option("--smoothing", type=click.Choice(list(SMOOTHINGS)), default="alpha 0.5, absmax", show_default=True)
@click.option("--format", "formats", multiple=True, default=("w4a8", "w4a6", "w4a4"), show_default=True)
@click.option("--only", multiple=True, help="Rows that hold this text, such as 'full Hadamard'.")
def main(
    checkpoint: str,
    stats: Path,
    planted: bool,
    which: str,
    smoothing: str,
    formats: tuple[str, ...],
    only: tuple[str, ...],
) -> None:
    torch.set_num_threads(1)
    model = Model(checkpoint, stats, planted)
    click.echo(
        f"| rotation | smoothing | {' | '.join(formats)} | online, % | s |\n|---|---|" + "---|" * (len(formats) + 2)
    )
    for name, smooth, rotate in variants(which, smoothing):
        if only and not any(text in name for text in only):
            continue
        began = time.perf_counter()
        decibels: list[float] = []
        by_format = [steps_of(smooth, rotate, form) for form in formats]
        if all(steps == by_format[0] for steps in by_format):
            decibels, cost = model.decibels(by_format[0], formats)
        else:
            for steps, form in zip(by_format, formats, strict=True):
                (value,), cost = model.decibels(steps, (form,))
                decibels.append(value)
        shown = " | ".join(f"{value:.2f}" for value in decibels)
        click.echo(f"| {name} | {shown} | {cost:.1f} | {time.perf_counter() - began:.0f} |")


if __name__ == "__main__":
    main()
