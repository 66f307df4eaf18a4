"""A recipe and a budget -> the same recipe with a rule for each linear, so that the budget holds and least is lost.

the passes before `quantize` run once; every linear is coded in every candidate format as `quantize` would do it
-> what each costs in the end on recorded trajectories -> the knapsack -> rules {select: linears, format: w3a8}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ditq.budget.choices import Choices, candidate_settings, make_choices
from ditq.budget.cost import Cost, find_cost
from ditq.budget.front import Point, agreement, front, point
from ditq.budget.pictures import Pictures
from ditq.budget.request import KEEP, Budget
from ditq.budget.search import smallest_good
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.latency import seconds_of
from ditq.memory import copied
from ditq.numerics.knapsack import best_known, smallest
from ditq.pass_steps import run_steps
from ditq.passes import Context, PassReport
from ditq.passes.base import CPU
from ditq.passes.quantize import Quantize
from ditq.progress import ProgressSetting
from ditq.recipe import Recipe
from ditq.site_cache import FolderSiteCache

JOINT = 3  # assignments of the front that are measured as a whole, to see how far single errors add up


@dataclass
class BudgetReport(PassReport):
    """What each linear got, the front, and how far predictions held."""

    front: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "front": self.front}


@dataclass(frozen=True)
class BudgetFit:
    """recipe: with the rules; report: for the engine; formats: candidate of each site; caches: finished codes of each."""

    recipe: Recipe
    report: BudgetReport
    formats: dict[str, str]
    caches: dict[str, FolderSiteCache]

    def hand_on(self, cache: FolderSiteCache) -> None:
        """Put the codes of the chosen formats where `quantize` will look for them, since they are the same.

        Kept linears have no say in the clipping of an input any more, and where codes suit the noise of that, they may differ.
        """
        steps = (step for step in self.recipe.passes if isinstance(step, Quantize))
        if KEEP in self.formats.values() and any(step.activation_noise for step in steps):
            return
        for site, name in self.formats.items():
            if name in self.caches:
                cache.adopt(site, self.caches[name])


def quantize_step(recipe: Recipe) -> int:
    """Where the recipe's `quantize` stands.

    Raises:
        DitqError: there is none, or more than one.
    """
    places = [place for place, step in enumerate(recipe.passes) if isinstance(step, Quantize)]
    if len(places) != 1:
        found = "no pass 'quantize'" if not places else f"{len(places)} passes 'quantize'"
        raise DitqError(f"{recipe.name}: has {found}; a budget needs exactly one, whose formats it chooses")
    return places[0]


def fit_budget(
    checkpoint: Checkpoint,
    graph: DiTGraph,
    recipe: Recipe,
    budget: Budget,
    statistics: Statistics,
    trajectories: Trajectories,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: ProgressSetting = None,
    device: torch.device = CPU,
) -> BudgetFit:
    """Choose formats within the budget. The graph is of the checkpoint's model as it came, and used up: passes before
    `quantize`, structural ones too, have changed it afterwards.

    Args:
        work: where finished codes are kept, so that an interrupted search goes on.
        device: where weights are rounded.

    Raises:
        DitqError: the recipe has not exactly one `quantize`, or nothing fits the budget; the nearest that does is named.
    """
    place = quantize_step(recipe)
    step = recipe.passes[place]
    assert isinstance(step, Quantize)
    original = copied(graph.model) if budget.kind == "psnr" else None
    folder = None if work is None else work / "budget"
    context = Context(statistics, seed, work=folder, device=device, latency=seconds_of).showing(progress)
    caches = _caches(checkpoint, recipe, budget, statistics, seed, work)
    with torch.no_grad():
        run_steps(graph, recipe.passes, context, progress, until=place, check=False)
        cost = find_cost(graph.model, trajectories, statistics, seed, context.original)
        held = set() if cost.adds_up else step.ruled(graph)
        choices = make_choices(graph, step, context, budget.candidates, caches.get, held)
    _check_possible(budget, choices)
    errors = cost.candidates(graph, choices, seed=seed, progress=progress)
    points, unproven = front(choices, errors), ""
    if original is not None:
        pictures = Pictures(checkpoint, original, trajectories, progress=progress)
        points = _search_pictures(graph, choices, points, pictures, budget)
    else:
        choice, unproven = _within(budget, choices, errors)
        points = _with_chosen(points, point(choices, errors, choice))
    points, agreed = _measure_jointly(graph, choices, points, cost)
    chosen = next(item for item in points if item.chosen)
    formats = choices.labels(chosen.choice)
    fitted = replace(step, rules=[*step.rules, *_rules(graph, step, formats)])
    fitted.check()
    passes = (*recipe.passes[:place], fitted, *recipe.passes[place + 1 :])
    named = Recipe(f"{recipe.name} {budget}", f"{recipe.name}, formats chosen for {budget}.", passes)
    return BudgetFit(named, _report(budget, choices, cost, errors, points, agreed, unproven), formats, caches)


def _caches(
    checkpoint: Checkpoint, recipe: Recipe, budget: Budget, statistics: Statistics, seed: int, work: Path | None
) -> dict[str, FolderSiteCache]:
    if work is None:
        return {}
    key = {
        "checkpoint": checkpoint.fingerprint(),
        "recipe": recipe.to_json(),
        "seed": seed,
        "statistics": statistics.metadata,
        "step_weights": statistics.step_weights,
    }
    return {
        name: FolderSiteCache(work / "candidates", {**key, "candidate": name})
        for name in budget.candidates
        if name != KEEP
    }


def _limit(budget: Budget, choices: Choices) -> tuple[NDArray[np.int64], int]:
    """(sizes [N, F], their limit) that a budget of size or bits means."""
    if budget.kind == "size":
        return choices.bytes, int(budget.value) - choices.fixed
    return choices.bits, int(budget.value * int(choices.weights.sum()))


def _check_possible(budget: Budget, choices: Choices) -> None:
    if budget.kind == "psnr":
        return
    sizes, limit = _limit(budget, choices)
    least = smallest(sizes)
    if least > limit:
        if budget.kind == "size":
            possible = f"size={(least + choices.fixed) / 1e6 + 0.005:.2f}MB"
        else:
            possible = f"bits={least / int(choices.weights.sum()) + 0.005:.2f}"
        raise DitqError(
            f"budget {budget}: impossible, the smallest with candidates {', '.join(choices.names)} is {possible}; "
            "allow more, or give candidates of fewer bits"
        )


def _within(budget: Budget, choices: Choices, errors: NDArray[np.float64]) -> tuple[NDArray[np.int64], str]:
    sizes, limit = _limit(budget, choices)
    return best_known(errors, sizes, limit)


def _with_chosen(points: Sequence[Point], chosen: Point) -> list[Point]:
    others = [item for item in points if item.bytes != chosen.bytes]
    return sorted([*others, replace(chosen, chosen=True)], key=lambda item: item.bytes)


def _search_pictures(
    graph: DiTGraph, choices: Choices, points: list[Point], pictures: Pictures, budget: Budget
) -> list[Point]:
    def measure(place: int) -> float:
        with choices.placed(graph, points[place].choice):
            return pictures.psnr(graph.model)

    levels = [10 * float(np.log10(max(item.predicted, 1e-300))) for item in points]
    place, found = smallest_good(levels, measure, budget.value)
    if place is None:
        raise DitqError(
            f"budget {budget}: not reached, the best with candidates {', '.join(choices.names)} is "
            f"{found[len(points) - 1]:.1f} dB; ask for less, or give candidates of more bits"
        )
    return [replace(item, psnr=found.get(index), chosen=index == place) for index, item in enumerate(points)]


def _measure_jointly(
    graph: DiTGraph, choices: Choices, points: list[Point], cost: Cost
) -> tuple[list[Point], tuple[float | None, float | None]]:
    """The points, some with their error measured as a whole; (correlation, mean difference in dB) of both."""
    wanted = {int(index) for index in np.linspace(0, len(points) - 1, JOINT).round()}
    done = [
        replace(item, measured=cost.assignment(graph, choices, item.choice)) if item.chosen or index in wanted else item
        for index, item in enumerate(points)
    ]
    pairs = [(item.predicted, item.measured) for item in done if item.measured and item.predicted]
    return done, agreement([a for a, _ in pairs], [b for _, b in pairs])


def _rules(graph: DiTGraph, step: Quantize, formats: dict[str, str]) -> list[dict[str, Any]]:
    """One rule for each format, with its groups and rank, that some linears get other than by the recipe itself."""
    rules: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    plan = step.plan(graph)
    for site, name in formats.items():
        settings = candidate_settings(plan[site], name, graph.sites[site])
        said: dict[str, Any] = {"keep": True} if settings.keep else {"format": settings.format}
        for key in ("group_size", "rank"):
            if (value := getattr(settings, key)) != getattr(plan[site], key):
                said[key] = value
        if "rank" in said and (step.rank_share or any("rank_share" in rule for rule in step.rules)):
            said["rank_share"] = 0.0  # which would decide otherwise
        if settings != plan[site]:
            rules.setdefault(tuple(said.items()), []).append(site)
    return [{"select": sites, **dict(said)} for said, sites in rules.items()]


def _report(
    budget: Budget,
    choices: Choices,
    cost: Cost,
    errors: NDArray[np.float64],
    points: Sequence[Point],
    agreed: tuple[float | None, float | None],
    unproven: str,
) -> BudgetReport:
    chosen = next(item for item in points if item.chosen)
    rows = [
        {
            "site": site,
            "chosen": choices.names[chosen.choice[row]],
            **{f"error as {name}": float(errors[row, index]) for index, name in enumerate(choices.names)},
        }
        for row, site in enumerate(choices.sites)
        if site not in choices.held
    ]
    told = chosen.row(choices)
    summary = {
        "weights, MB": chosen.bytes / 1e6,
        "bits a weight": chosen.bits,
        "errors are of": cost.unit,
        **{key: told[key] for key in ("linears", "predicted error, dB", "measured error, dB")},
        "correlation": agreed[0],
        "measured over predicted, dB": agreed[1],
    }
    if chosen.psnr is not None:
        summary["PSNR, dB"] = chosen.psnr
    if unproven:
        summary["not proven to be the best"] = unproven
    settings = {"budget": str(budget), "candidates": list(budget.candidates)}
    return BudgetReport("budget", settings, rows, summary, [item.row(choices) for item in points])
