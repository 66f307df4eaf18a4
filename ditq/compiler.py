"""Compile: checkpoint -> calibration -> the recipe's passes over the graph -> engine folder with its report.

This file is the whole path at a glance; each step lives in its own module.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ditq.budget import Budget
from ditq.budget.fit import BudgetFit, fit_budget
from ditq.calibration.calibrate import TRAJECTORIES, calibrate, choose_conditions, pipeline_class
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.calibration.storage import make_folder
from ditq.checkpoint import Checkpoint
from ditq.compile_checks import asked, asked_gpus, check_options, check_recipe, target_to_compile_for
from ditq.compile_options import CompileOptions
from ditq.devices import AUTO, device_of
from ditq.errors import DitqError
from ditq.export.engine import Engine
from ditq.export.onnx_graph import Axes
from ditq.export.plans.make import MadePlan, make_plans
from ditq.export.weights_file import WEIGHTS
from ditq.export.write import check_replaceable, write_engine
from ditq.folders import check_output, work_folder
from ditq.given import followed, path_of
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.memory import peak_memory
from ditq.nn import QuantLinear
from ditq.nn.structural.scheduled_block import edges_of
from ditq.nn.structural.token_attention import token_attentions
from ditq.numerics.token_layout import TokenLayout
from ditq.pass_pipeline import run_passes
from ditq.passes import PassReport
from ditq.passes.distill import Distill
from ditq.recipe import DEFAULT, Recipe, load_recipe
from ditq.recorded_family import with_family


@dataclass(frozen=True)
class CompileResult:
    """What `compile` made. `seconds` by stage; `peak_memory` in bytes, of this process so far; `text_sites` are the linears
    that run once for a prompt; `plans` were built for kinds of GPU; `offloaded`: whether the weights stood on disk.
    """

    engine: Engine
    recipe: Recipe
    reports: list[PassReport]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    text_sites: tuple[str, ...] = ()
    plans: Sequence[MadePlan] = ()
    offloaded: bool = False


def compile(
    checkpoint: Checkpoint | str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = DEFAULT,
    options: CompileOptions = CompileOptions(),
) -> CompileResult:
    """Compile a diffusion transformer into an engine folder.

    Raises:
        DitqError: anything wrong with the checkpoint, recipe, prompts, statistics or output; nothing is left half-written.
    """
    out = followed(path_of("out", out))
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    check_options(options)
    check_output(out, options.force)
    check_replaceable(out)
    wanted = target_to_compile_for(options.target)
    gpus = asked_gpus(wanted, options)
    recipe, budget = asked(recipe, options)
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    if budget is not None and budget.kind == "psnr":
        pipeline_class(checkpoint)
    clock = _Clock()
    with work_folder(out, options.resume) as work:
        checkpoint.check()
        checkpoint, statistics = _of_a_family(checkpoint, work, options)
        clock.lap("calibrate")
        inputs, family, fitted = example_inputs(checkpoint), checkpoint.family, None
        assert family is not None
        check_recipe(recipe, checkpoint, inputs, wanted, gpus if options.gpus else (), budget)
        clock.lap("structure")
        needed = budget is not None or any(step.requires_statistics for step in recipe.passes)
        statistics = statistics or _statistics(checkpoint, work, options, needed)
        clock.lap("calibrate")
        weights = _weights_folder(checkpoint, work, options.offload)
        model = checkpoint.load_model(offload=weights)
        graph = DiTGraph(model, inputs)
        if (picture := _other_picture(graph, inputs, family.axes, statistics)) is not None:
            inputs = example_inputs(checkpoint, picture=picture)
            graph = DiTGraph(model, inputs)
        if statistics is not None:
            statistics.check(graph)
        clock.lap("load")
        if budget is not None and statistics is not None:
            fitted = _fit(checkpoint, graph, recipe, budget, statistics, work, options)
            recipe, model = fitted.recipe, checkpoint.load_model(offload=weights)
            graph = DiTGraph(model, inputs)
            clock.lap("budget")
        reports = run_passes(
            graph, recipe, statistics, checkpoint, work, fitted, seed=options.seed, device=options.device,
            progress=options.progress,
        )  # fmt: skip
        clock.lap("passes")
        text_sites = _text_sites(graph, checkpoint.changing) if options.cache_text and not edges_of(model) else ()
        engine = write_engine(
            out,
            model,
            name=checkpoint.name,
            config=checkpoint.config,
            class_name=checkpoint.class_name,
            family=family.name,
            fingerprint=checkpoint.fingerprint(),
            recipe=recipe.to_json(),
            inputs=inputs,
            axes=family.axes,
            sizes=family.sizes(checkpoint.config),
            keep_example=checkpoint.recorded is not None or picture is not None,
            picture=_calibrated_picture(graph, statistics),
            sampling=statistics.sampling_beside(checkpoint.sampling) if statistics is not None else None,
            target_name=options.target,
            reports=[report.to_json() for report in reports],
            changing=checkpoint.changing if text_sites else None,
            force=options.force,
            work=work,
            accept=lambda made: _check_size(made, budget),
        )
        _note_fixed(engine, family.axes)
        clock.lap("export")
        plans: list[MadePlan] = []
        if gpus:
            engine, plans = make_plans(engine, options.gpus, options.sizes, options.progress)
            clock.lap("plans")
    offloaded = weights is not None
    return CompileResult(engine, recipe, reports, clock.seconds, peak_memory(), text_sites, plans, offloaded)


def take_part(
    checkpoint: Checkpoint | str | Path,
    recipe: Recipe | str | Path = DEFAULT,
    options: CompileOptions = CompileOptions(),
) -> None:
    """What a process other than the first does of a compile: its share of each distillation. Nothing is written.

    Raises:
        DitqError: as `compile`, for what both read.
    """
    check_options(options)
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    shared = max((number for number, step in enumerate(recipe.passes, 1) if isinstance(step, Distill)), default=0)
    if checkpoint.family is None:
        checkpoint = with_family(checkpoint, _trajectories(checkpoint, Path(), options))
    graph = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))
    statistics = Statistics.open(str(options.statistics), fingerprint=checkpoint.fingerprint(), graph=graph)
    few = replace(recipe, passes=recipe.passes[:shared])
    run_passes(graph, few, statistics, seed=options.seed, device=options.device, progress=options.progress)


def _weights_folder(checkpoint: Checkpoint, work: Path, offload: str) -> Path | None:
    """Where the weights stand while passes work on them; None for memory."""
    if offload == "none" or (offload == AUTO and not checkpoint.larger_than_memory):
        return None
    make_folder(folder := work / "weights")
    return folder


def _text_sites(graph: DiTGraph, changing: Collection[str]) -> tuple[str, ...]:
    """Linears of the text alone, without those whose scale of the input is now told by the timestep."""
    found = {site: graph.linear(site) for site in graph.text_sites(changing)}
    return tuple(
        site
        for site, layer in found.items()
        if not (isinstance(layer, QuantLinear) and layer.activation.granularity == "timestep")
    )


def _statistics(checkpoint: Checkpoint, work: Path, options: CompileOptions, needed: bool) -> Statistics | None:
    """Those that were given, or of calls made now if they are needed. What was given and is not needed is looked at too."""
    if options.statistics is not None:
        return Statistics.open(options.statistics, fingerprint=checkpoint.fingerprint())
    if not needed:
        if options.conditions is not None:
            choose_conditions(checkpoint, options.conditions, options.limit)
        return None
    return calibrate(
        checkpoint,
        work / "calibration",
        conditions=options.conditions,
        steps=options.steps,
        device=options.device,
        seed=options.seed,
        limit=options.limit,
        resume=options.resume,
        progress=options.progress,
    )


def _trajectories(checkpoint: Checkpoint, work: Path, options: CompileOptions) -> Trajectories:
    """The recorded calls beside the statistics."""
    calibrated = work / "calibration" if options.statistics is None else Path(options.statistics)
    return Trajectories.open(calibrated / TRAJECTORIES, checkpoint.fingerprint())


def _of_a_family(checkpoint: Checkpoint, work: Path, options: CompileOptions) -> tuple[Checkpoint, Statistics | None]:
    """The checkpoint with what its forward takes: where no family tells, the calls of its pipeline show it."""
    if checkpoint.family is not None:
        return checkpoint, None
    statistics = _statistics(checkpoint, work, options, needed=True)
    return with_family(checkpoint, _trajectories(checkpoint, work, options)), statistics


def _calibrated_picture(graph: DiTGraph, statistics: Statistics | None) -> tuple[int, int] | None:
    """Rows and columns of image tokens in the first recorded call, where token attentions read them off positions."""
    if graph.layout is None or graph.layout.positions is None or not token_attentions(graph.model):
        return None
    return _recorded_picture(graph.layout, statistics)


def _other_picture(
    graph: DiTGraph, inputs: Mapping[str, Any], axes: Axes, statistics: Statistics | None
) -> tuple[int, int] | None:
    """Rows and columns of image tokens of the recorded calls, where an engine is for one size and that is not the usual one."""
    layout = graph.layout
    if layout is None or layout.positions is not None or any(axes[layout.latents][-2:]):
        return None
    recorded, usual = _recorded_picture(layout, statistics), layout.grid(inputs)
    return None if recorded == (usual.height, usual.width) else recorded


def _recorded_picture(layout: TokenLayout, statistics: Statistics | None) -> tuple[int, int] | None:
    """Rows and columns of image tokens in the first recorded call; None where none is kept."""
    folder = None if statistics is None else statistics.folder
    if folder is None or not (folder / TRAJECTORIES).is_dir():
        return None
    call = next(Trajectories.open(folder / TRAJECTORIES).calls(chosen=frozenset({0})))
    grid = layout.grid(call.arguments)
    return grid.height, grid.width


def _fit(
    checkpoint: Checkpoint,
    graph: DiTGraph,
    recipe: Recipe,
    budget: Budget,
    statistics: Statistics,
    work: Path,
    options: CompileOptions,
) -> BudgetFit:
    trajectories = _trajectories(checkpoint, work, options).in_float32()
    for step in recipe.passes:
        step.check_recorded(trajectories, options.seed)
    return fit_budget(checkpoint, graph, recipe, budget, statistics, trajectories, seed=options.seed, work=work,
                      progress=options.progress, device=device_of(options.device))  # fmt: skip


def _note_fixed(engine: Engine, axes: Axes) -> None:
    """Say on standard error which axes of the family's have one size only: what calls them otherwise will be refused."""
    shapes = {entry["name"]: entry["shape"] for entry in engine.manifest["inputs"]}
    for axis in engine.manifest["dropped_axes"]:
        name, place = next((name, row.index(axis)) for name, row in axes.items() if axis in row and name in shapes)
        print(
            f"note: {engine.name}: takes {name} with {axis} {shapes[name][place]} only, since the forward of "
            f"{engine.manifest['class_name']} turns that size into a number",
            file=sys.stderr,
        )


def _check_size(made: Path, budget: Budget | None) -> None:
    """The sizes that formats were chosen by leave room for what the export adds; this is the proof that it was enough."""
    if budget is None or budget.kind != "size":
        return
    found = (made / WEIGHTS).stat().st_size
    if found > budget.value:
        raise DitqError(f"budget {budget}: {WEIGHTS} has {found:,d} bytes, more than expected; ask for a little less")


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
