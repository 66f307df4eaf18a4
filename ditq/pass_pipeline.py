"""The passes of a whole recipe over a graph, with what is kept of them when a compile is interrupted."""

from __future__ import annotations

from pathlib import Path

from ditq.budget.fit import BudgetFit
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.devices import AUTO, device_of
from ditq.graph import DiTGraph
from ditq.latency import seconds_of
from ditq.pass_steps import run_steps
from ditq.passes import Context, PassReport
from ditq.progress import ProgressSetting
from ditq.recipe import Recipe
from ditq.site_cache import FolderSiteCache


def run_passes(
    graph: DiTGraph,
    recipe: Recipe,
    statistics: Statistics | None,
    checkpoint: Checkpoint | None = None,
    work: Path | None = None,
    fitted: BudgetFit | None = None,
    *,
    seed: int = 0,
    device: str = AUTO,
    progress: ProgressSetting = None,
) -> list[PassReport]:
    """Run the recipe over the graph in place. After it the graph still runs, now with what the passes put in.

    `checkpoint`, `work`: what finished layers are kept under, and the folder that keeps them. `fitted`: the budget that the
    recipe was fitted to; its report comes first, and its codes are not made again. The rest as in `CompileOptions`.
    """
    if recipe.budget is not None:
        raise ValueError(f"{recipe.name} has a budget; run what `fit_budget` makes of it")
    cache = None
    if work is not None and checkpoint is not None:
        key = {
            "checkpoint": checkpoint.fingerprint(),
            "recipe": recipe.to_json(),
            "seed": seed,
            "statistics": None if statistics is None else statistics.metadata,
            "step_weights": None if statistics is None else statistics.step_weights,
        }
        cache = FolderSiteCache(work / "sites", key)
        if fitted is not None:
            fitted.hand_on(cache)
    keep_weights = any(step.wants_weights for step in recipe.passes)
    place = device_of(device)
    context = Context(statistics, seed, cache, keep_weights, work, place, seconds_of).showing(progress)
    reports: list[PassReport] = [] if fitted is None else [fitted.report]
    return reports + run_steps(graph, recipe.passes, context, progress)
