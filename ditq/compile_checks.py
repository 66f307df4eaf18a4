"""What a compile refuses before anything is calibrated or computed, and what its options ask of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditq import processes
from ditq.budget import Budget
from ditq.budget.attention import within
from ditq.budget.choices import check_candidates
from ditq.budget.fit import quantize_step
from ditq.budget.request import ATTENTION
from ditq.checkpoint import Checkpoint
from ditq.compile_options import OFFLOAD, CompileOptions
from ditq.devices import device_of
from ditq.errors import DitqError
from ditq.export.arguments import flatten
from ditq.export.plans.make import check_numbers, kinds_of_gpu
from ditq.export.plans.sizes import parse_sizes
from ditq.export.targets import Target, target, targets
from ditq.given import check_seed, check_whole, path_of
from ditq.graph import DiTGraph
from ditq.passes import Pass
from ditq.passes.quantize import Quantize
from ditq.recipe import Recipe
from ditq.suggest import unknown_key


def asked(recipe: Recipe, options: CompileOptions) -> tuple[Recipe, Budget | None]:
    """The budget of formats, and the recipe, with a budget of attention in the pass that chooses within it."""
    budget = Budget.parse(options.budget) if isinstance(options.budget, str) else options.budget or recipe.budget
    if budget is not None and budget.kind == ATTENTION:
        recipe = within(recipe, budget)
        budget = recipe.budget
    if budget is not None:
        quantize_step(recipe)
        if trained := next((step.name for step in recipe.passes if step.trains), None):
            raise DitqError(
                f"{recipe.name}: a budget would train twice; run {trained!r} without it, or leave that pass out"
            )
    return recipe, budget


def check_options(options: CompileOptions) -> None:
    """Raise DitqError for what no compile takes, before anything is read or computed."""
    if not isinstance(options, CompileOptions):
        raise DitqError(f"options is a {type(options).__name__}; give ditq.CompileOptions(...)")
    check_whole("limit", options.limit, 1)
    if options.statistics is not None:
        path_of("statistics", options.statistics)
    check_seed(options.seed)
    if not isinstance(options.budget, Budget | str | None):
        raise DitqError(f"budget is {options.budget!r}; write it as a word, such as 'size=4.2MB' or 'bits=3.5'")
    device_of(options.device)
    if options.offload not in OFFLOAD:
        raise DitqError(unknown_key("offload", options.offload, list(OFFLOAD)))
    if processes.count() > 1 and options.statistics is None:
        raise DitqError(
            f"{processes.count()} processes compile together and none calibrates: run `ditq calibrate` once and give --stats"
        )


def target_to_compile_for(name: str) -> Target:
    """Raise DitqError for a target that is unknown or only runs engines of others."""
    found = target(name)
    if found.lower is None and found.check is None:
        others = ", ".join(
            other for other, each in targets().items() if each.lower is not None or each.check is not None
        )
        raise DitqError(f"target '{name}' runs engines but cannot be compiled for; compile for one of {others}")
    return found


def asked_gpus(wanted: Target, options: CompileOptions) -> list[str]:
    """What plans are built for; refused before anything is computed."""
    if not wanted.plans:
        if options.gpus or options.sizes:
            raise DitqError(
                f"target '{wanted.name}' builds nothing for single kinds of GPU; leave --gpu and --sizes out"
            )
        return []
    parse_sizes(options.sizes or "")
    return kinds_of_gpu(options.gpus)


def check_recipe(
    recipe: Recipe,
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    wanted: Target,
    gpus: Sequence[str],
    budget: Budget | None,
) -> None:
    """Whether the recipe and the candidates fit the model, and target and GPUs can multiply what it makes, before an hour is
    spent on that."""
    if name := next((name for name, value in flatten(inputs)[0].items() if value.is_complex()), None):
        raise DitqError(
            f"{checkpoint.name}: its argument {name} holds complex numbers, which no engine's graph can take"
        )
    # What passes would leave is seen without weights, so that while it is calibrated the model is in memory once.
    graph = DiTGraph(checkpoint.skeleton(), inputs)

    def look(step: Pass, found: DiTGraph) -> None:
        if not isinstance(step, Quantize):
            return
        plan = step.plan(found)
        if budget is not None:
            check_candidates(found, step, plan.keys() - step.ruled(found), budget.candidates)
        for site, settings in plan.items():
            wanted.check_product(site, settings.carrier, settings.bits)
            if settings.bits < 16:
                check_numbers(site, settings.carrier.partition("_")[0], gpus)

    _check_state(recipe, wanted)
    recipe.preview(graph, look)


def _check_state(recipe: Recipe, wanted: Target) -> None:
    """Whether the target keeps what a pass's parts find in one call for the next ones."""
    for step in recipe.passes:
        if step.keeps_state and wanted.lower is not None:
            without = ", ".join(
                name for name, each in targets().items() if each.lower is None and each.check is not None
            )
            raise DitqError(
                f"pass {step.name!r}: what it finds in one step is for the next ones, and an engine for {wanted.name} keeps "
                f"nothing between calls; compile with --target {without}, or set blocks: online"
            )
