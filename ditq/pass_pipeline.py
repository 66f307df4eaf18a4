"""The passes of a recipe, one after the other, over a graph; what is exact is checked, what changed is calibrated again."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ditq.budget.fit import BudgetFit
from ditq.calibration.collect import collect_statistics
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.devices import AUTO, device_of
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.latency import seconds_of
from ditq.memory import copied
from ditq.passes import Context, PassReport
from ditq.passes.block_records import tensors_of
from ditq.progress import ProgressSetting
from ditq.recipe import Recipe
from ditq.site_cache import FolderSiteCache

UNCHANGED = 1e-2  # of the answer: what float32 loses is 1e-6 to 1e-4, what a wrong fold does 1e-1 and more


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
    structural = [step for step in recipe.passes if step.structural]
    with torch.no_grad():
        if structural:
            context.original = copied(graph.model)
        for step in recipe.passes:
            step.prepare(graph, context)
        for number, step in enumerate(recipe.passes):
            before = _answer(graph) if step.exact else None
            reports.append(step.run(graph, context))
            if before is not None:
                _check_unchanged(step.name, before, _answer(graph))
            later = recipe.passes[number + 1 :]
            last_change = step.structural and not any(other.structural for other in later)
            if last_change and any(other.requires_statistics for other in later):
                context.restructured(_collected_again(graph, context, progress))
    return reports


def _answer(graph: DiTGraph) -> Tensor:
    """What the model gives for its example inputs."""
    return tensors_of(graph.model(**graph.example_inputs, return_dict=False))[0].double()


def _check_unchanged(name: str, before: Tensor, after: Tensor) -> None:
    """Raise DitqError if a pass that only moves numbers about has changed what the model computes."""
    error = float((after - before).norm() / before.norm().clamp_min(1e-30))
    if not error < UNCHANGED:
        raise DitqError(
            f"pass {name!r} changed what the model computes, by {error:.1g} of its answer: this model is put together in a way "
            "that is not understood here; leave the pass out, and report the model's class"
        )


def _collected_again(graph: DiTGraph, context: Context, progress: ProgressSetting) -> Statistics:
    """Statistics of the model as structural passes have left it, on the calls that were recorded of the original."""
    told = context.calibration
    folder = None if context.work is None else context.work / "restructured"
    if folder is not None:  # cleared first: those of another recipe would look the same
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    graph.model.to(context.device)
    try:
        return collect_statistics(
            graph,
            context.trajectories(),
            int(told["bins"]),
            int(told["rows_per_bin"]),
            seed=context.seed,
            progress=progress,
            moments=told.get("moments", "bins"),
            folder=folder,
        )
    finally:
        graph.model.to("cpu")
