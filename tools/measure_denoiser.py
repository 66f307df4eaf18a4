"""How far recipes move the denoiser's output, on trajectories of prompts that no recipe has seen: a figure with little noise.

    python -m tools.measure_denoiser mini --stats stats w3a8 w3a8,-reconstruct w4a8,quantize.group_size=0 my-recipe.yaml

A recipe is a shipped one's name or a file, and after commas what is changed in it: `-PASS` leaves a pass out,
`PASS.SETTING=VALUE` sets something.

Pictures of a few prompts differ by several dB from one to the next, and a trajectory that has left the original's may be
far off in the picture for a small cause. Here both models get the same inputs, the original's: the ratio of signal to
error is that of all steps, of each quarter of them, and with every step counted by its effect on the last latents, where
the statistics hold step weights. Beside it stands the ratio in the last latents when each model draws for itself (the mean in
dB; what the last step gets), where errors of all steps and guidance branches add up or cancel.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import torch
import yaml
from torch import Tensor, nn

from ditq.budget.along_trajectory import AlongTrajectories
from ditq.budget.fit import fit_budget
from ditq.calibration.batches import CallBatch, sampled_batches
from ditq.calibration.record import Trajectories, record_trajectories
from ditq.calibration.sampling import SamplingSettings
from ditq.calibration.statistics import TRAJECTORIES, Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.pass_pipeline import run_passes
from ditq.recipe import Recipe, load_recipe
from ditq.report.evaluate import heldout_conditions
from ditq.report.metrics import decibels
from tools.measure_recipes import bits_a_weight, table

QUARTERS = 4


class Denoiser:
    """The original's answers to recorded calls, and how far another model's are from them."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[CallBatch],
        steps: int,
        weights: Tensor | None,
        along: AlongTrajectories | None,
    ) -> None:
        self.batches, self.steps, self.weights, self.along = batches, steps, weights, along
        with torch.no_grad():
            self.wanted = [model(**batch.arguments)[0] for batch in batches]
        self.energy = self._by_step(self.wanted)

    def _by_step(self, tensors: list[Tensor]) -> Tensor:
        """Sum of squares of the samples of each step: float64 [T]."""
        sums = torch.zeros(self.steps, dtype=torch.float64)
        for batch, tensor in zip(self.batches, tensors, strict=True):
            sums.index_add_(0, batch.steps, tensor.double().square().flatten(1).sum(1).cpu())
        return sums

    @torch.no_grad()
    def figures(self, model: nn.Module) -> list[str]:
        """In dB: of the last latents, over all steps, weighted by effect (or -), and each quarter of the steps."""
        lost = [model(**batch.arguments)[0] - wanted for batch, wanted in zip(self.batches, self.wanted, strict=True)]
        error = self._by_step(lost)
        found = ["-" if self.along is None else f"{decibels(self.along.drawn(model)):.2f}"]
        found.append(_db(self.energy.sum(), error.sum()))
        found.append("-" if self.weights is None else _db(self.energy @ self.weights, error @ self.weights))
        quarters = [torch.arange(self.steps) * QUARTERS // self.steps == number for number in range(QUARTERS)]
        return found + [_db(self.energy[part].sum(), error[part].sum()) for part in quarters]


def _db(signal: Tensor, error: Tensor) -> str:
    return f"{float(10 * torch.log10(signal / error.clamp_min(1e-30))):.2f}"


def changed(text: str) -> Recipe:
    """The recipe that a command-line argument means.

    Raises:
        DitqError: whatever is wrong with the recipe that results.
    """
    name, *changes = text.split(",")
    values = load_recipe(name).to_json()
    for change in changes:
        if change.startswith("-"):
            values["passes"] = [step for step in values["passes"] if change[1:] not in step]
            continue
        place, _, value = change.partition("=")
        wanted, _, setting = place.partition(".")
        for step in values["passes"]:
            if wanted in step:
                step[wanted][setting] = yaml.safe_load(value)
    return Recipe.from_dict(values, text)


@click.command()
@click.argument("checkpoint")
@click.argument("recipes", nargs=-1, required=True)
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--limit", default=8, show_default=True, help="Held-out prompts.")
@click.option("--seed", default=1000, show_default=True)
def main(checkpoint: str, recipes: tuple[str, ...], stats: Path, limit: int, seed: int) -> None:
    """Print one row for each of RECIPES."""
    wanted = {text: changed(text) for text in recipes}
    opened = Checkpoint.open(checkpoint)
    statistics = Statistics.open(stats, opened.fingerprint())
    with tempfile.TemporaryDirectory() as folder:
        settings = SamplingSettings.for_checkpoint(opened, None, seed, {})
        conditions = list(heldout_conditions(opened, limit))
        trajectories: Trajectories = record_trajectories(opened, conditions, settings, Path(folder) / "held-out", False)
        batches = sampled_batches(trajectories, 1 << 30, 16)
        measured = statistics.step_weights
        weights = None if measured is None else measured.by_step("effect")
        original = opened.load_model()
        along = AlongTrajectories.of(original, trajectories)
        judge = Denoiser(original, batches, trajectories.steps, weights, along)
    rows = []
    for name, recipe in wanted.items():
        graph = DiTGraph(opened.load_model(), example_inputs(opened))
        began = time.process_time()
        if recipe.budget is not None:
            chosen_on = Trajectories.open(stats / TRAJECTORIES, opened.fingerprint())
            beside = DiTGraph(opened.load_model(), example_inputs(opened))
            recipe = fit_budget(opened, beside, recipe, recipe.budget, statistics, chosen_on).recipe
        reports = run_passes(graph, recipe, statistics)
        minutes = (time.process_time() - began) / 60
        coded = any(report.name == "quantize" for report in reports)
        bits = f"{bits_a_weight(reports):.2f}" if coded else "-"
        rows.append([name, bits, *judge.figures(graph.model), f"{minutes:.1f}"])
    quarters = [f"quarter {number + 1}" for number in range(QUARTERS)]
    table(
        [
            "recipe",
            "bits a weight",
            "last latents, dB",
            "all steps, dB",
            "weighted by effect",
            *quarters,
            "processor minutes",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
