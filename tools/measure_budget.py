"""Mixed precision against the recipe with one format everywhere: size, error of the last latents, pictures.

    python -m tools.measure_budget mini --stats stats --limit 16

Formats are chosen on the recorded calls of the statistics, pictures are of held-out prompts, all in torch. `agreement` is
between the predicted and the measured error of the assignments in the table.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

from ditq.budget.choices import make_choices
from ditq.budget.cost import find_cost
from ditq.budget.front import agreement
from ditq.budget.request import CANDIDATES, parse_candidates
from ditq.budget.sensitivity import SingleCalls
from ditq.calibration.calibrate import TRAJECTORIES
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.numerics.knapsack import smallest, solve
from ditq.passes import Context
from ditq.recipe import load_recipe
from ditq.report.evaluate import heldout_conditions
from ditq.report.metrics import decibels, psnr
from tools.measure_recipes import split_at_quantize


class Drawing:
    """Held-out prompts drawn several at a time; picture i from the noise of seed + i whatever the batch."""

    def __init__(self, checkpoint: Checkpoint, limit: int, seed: int, batch: int = 8) -> None:
        self.pipeline = checkpoint.load_pipeline()
        self.prompts = [str(prompt) for prompt in heldout_conditions(checkpoint, limit)]
        self.arguments, self.seed, self.batch = dict(checkpoint.sampling), seed, batch
        self.reference = self.draw(self.pipeline.transformer)

    @torch.no_grad()
    def draw(self, model: nn.Module) -> list[np.ndarray]:
        self.pipeline.transformer = model
        drawn: list[np.ndarray] = []
        for start in range(0, len(self.prompts), self.batch):
            prompts = self.prompts[start : start + self.batch]
            arguments = dict(self.arguments)
            if "negative_prompt" in arguments:
                arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
            noise = [torch.Generator().manual_seed(self.seed + start + place) for place in range(len(prompts))]
            drawn += [np.asarray(image) for image in self.pipeline(prompt=prompts, generator=noise, **arguments).images]
        return drawn

    def quality(self, model: nn.Module) -> tuple[float, float]:
        """Mean and worst PSNR."""
        values = [psnr(a, b) for a, b in zip(self.reference, self.draw(model), strict=True)]
        return float(np.mean(values)), min(values)


@click.command()
@click.argument("name")
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--recipe", default="w4a8", show_default=True, help="The recipe with one format everywhere.")
@click.option("--candidates", default=",".join(CANDIDATES), show_default=True)
@click.option("--shares", default="1.0,0.85,0.8", show_default=True, help="Sizes to try, over the recipe's own.")
@click.option("--limit", default=16, show_default=True, help="Held-out prompts.")
@click.option("--seed", default=1000, show_default=True)
@click.option("--single-calls", is_flag=True, help="Choose by errors of single calls, not of the last latents.")
def main(
    name: str, stats: Path, recipe: str, candidates: str, shares: str, limit: int, seed: int, single_calls: bool
) -> None:
    """Print the table of mixed precision in docs/results.md."""
    began = time.process_time()
    checkpoint, statistics = Checkpoint.open(name), Statistics.open(stats)
    trajectories = Trajectories.open(stats / TRAJECTORIES, checkpoint.fingerprint()).in_float32()
    graph = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))
    context, names = Context(statistics), parse_candidates(candidates)
    earlier, step = split_at_quantize(load_recipe(recipe))
    with torch.no_grad():
        for item in earlier:
            item.run(graph, context)
        choices = make_choices(graph, step, context, names)
    how = SingleCalls.of if single_calls else find_cost
    cost = how(graph.model, trajectories, statistics)
    errors = cost.candidates(graph, choices)
    click.echo(f"candidates and sensitivities: {time.process_time() - began:.0f} s of processor time", err=True)
    click.echo(f"errors are of {cost.unit}", err=True)
    rows = np.arange(len(choices.sites))
    plan = step.plan(graph)
    uniform = np.array([names.index(plan[site].format.partition("a")[0]) for site in choices.sites])
    cases = {recipe: uniform}
    for share in shares.split(","):
        limit_bytes = int(float(share) * choices.size(uniform)) - choices.fixed
        if smallest(choices.bytes) > limit_bytes:
            raise click.UsageError(f"no assignment has {share} of the recipe's size; give candidates of fewer bits")
        cases[f"mixed, {share} of its size"] = solve(errors, choices.bytes, limit_bytes)
    drawing = Drawing(checkpoint, limit, seed)
    pairs = []
    click.echo("| formats | weights, MB | bits a weight | predicted, dB | measured, dB | PSNR, dB | worst | linears |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for label, choice in cases.items():
        predicted = float(errors[rows, choice].sum())
        found = cost.assignment(graph, choices, choice)
        pairs.append((predicted, found))
        with choices.placed(graph, choice):
            mean, worst = drawing.quality(graph.model)
        counts = ", ".join(f"{(choice == i).sum()} {n}" for i, n in enumerate(names) if (choice == i).any())
        errors_db = f"{-decibels(predicted):.1f} | {-decibels(found):.1f}"
        size = f"{choices.size(choice) / 1e6:.2f} | {choices.bits_a_weight(choice):.2f}"
        click.echo(f"| {label} | {size} | {errors_db} | {mean:.2f} | {worst:.2f} | {counts} |")
        sys.stdout.flush()
    correlation, difference = agreement([a for a, _ in pairs], [b for _, b in pairs])
    click.echo(f"\nagreement: correlation {correlation:.3f}, measured over predicted {difference:+.2f} dB")


if __name__ == "__main__":
    main()
