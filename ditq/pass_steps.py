"""Passes one after the other over a graph: what is exact is checked, what changed is calibrated again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from ditq.calibration.collect import collect_statistics
from ditq.calibration.statistics import Statistics
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.memory import copied
from ditq.passes import Context, Pass, PassReport
from ditq.passes.block_records import tensors_of
from ditq.progress import ProgressSetting

UNCHANGED = 1e-2  # of the answer: what float32 loses is 1e-6 to 1e-4, what a wrong fold does 1e-1 and more


@torch.no_grad()
def run_steps(
    graph: DiTGraph,
    passes: Sequence[Pass],
    context: Context,
    progress: ProgressSetting = None,
    *,
    until: int | None = None,
    check: bool = True,
) -> list[PassReport]:
    """Run the passes over the graph in place.

    Args:
        until: run the first so many only; what the others need is made ready all the same.
        check: compare the model's answer before and after passes that only move numbers about.

    Raises:
        DitqError: what a pass raises, and when such a pass has changed the answer.
    """
    reports = []
    if any(step.structural for step in passes):
        context.original = copied(graph.model)
    for step in passes[:until]:
        step.prepare(graph, context)
    for number, step in enumerate(passes[:until], start=1):
        before = _answer(graph) if check and step.exact else None
        reports.append(step.run(graph, context))
        if before is not None:
            _check_unchanged(step.name, before, _answer(graph))
        later = passes[number:]
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
