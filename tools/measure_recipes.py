"""Measure every shipped recipe on a checkpoint, beside plain round-to-nearest: the tables of docs/results.md.

    python tools/measure_recipes.py mini --limit 32
    python tools/measure_recipes.py mini --limit 32 --ablation

Original and engine draw the same held-out prompts from the same seeds; PSNR is the mean over pictures. The engines run in
ONNX Runtime, the baselines and ablations in their torch meaning.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from ditq.budget.fit import quantize_step
from ditq.calibration.calibrate import calibrate
from ditq.calibration.sampling import SamplingSettings, sample
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.compiler import CompileOptions, compile
from ditq.export.agreement import model_agreement
from ditq.export.float64 import float64_agreement
from ditq.export.fusion import prove_fusion
from ditq.export.loader import load_engine
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.pass_pipeline import run_passes
from ditq.passes import Pass, PassReport
from ditq.passes.quantize import Quantize
from ditq.recipe import Recipe, shipped_recipes
from ditq.report.evaluate import heldout_conditions
from ditq.report.measure import file_sizes
from ditq.report.metrics import psnr

MODULATION = {"select": "role:modulation", "format": "w4a16", "codebook": "uniform", "group_size": 64}


def nearest(form: str, codebook: str) -> list[dict[str, Any]]:
    """Round-to-nearest of the blocks' token linears, nothing else done."""
    settings = {
        "format": form,
        "codebook": codebook,
        "rounding": "nearest",
        "weighted": False,
        "bias_correction": False,
    }
    return [{"quantize": settings}]


BASELINES = {
    "w8a8": nearest("w8a8", "uniform_absmax"),
    "w6a8": nearest("w6a8", "uniform_absmax"),
    "w4a16": nearest("w4a16", "uniform_absmax"),
    "w4a16, clip search": nearest("w4a16", "uniform"),
    "w4a8, clip search": nearest("w4a8", "uniform"),
    "w4a4, clip search": nearest("w4a4", "uniform"),
    "w3a8, clip search": nearest("w3a8", "uniform"),
}


def w4a8(smooth: dict[str, Any] | None = None, rotate: dict[str, Any] | None = None, **quantize: Any) -> list[Any]:
    """w4a8 with rotation by search and one thing changed; `smooth` or `rotate` of {"skip": True} leaves the pass out."""
    steps = [{"smooth": smooth or {}}, {"rotate": rotate or {}}, {"quantize": {"rules": [MODULATION], **quantize}}]
    return [step for step in steps if not next(iter(step.values())).get("skip")]


ABLATIONS = {
    "rotation chosen by layer error (search)": w4a8(),
    "per-row twin-log tables": w4a8(codebook="twin_log"),
    "uniform levels": w4a8(codebook="uniform"),
    "round to nearest instead of GPTQ": w4a8(rounding="nearest"),
    "scales searched on weight error": w4a8(weighted=False),
    "groups of 64 by multipliers": w4a8(group_size=64),
    "no smoothing, no centring": w4a8(smooth={"skip": True}),
    "centring alone (alpha 0)": w4a8(smooth={"alpha": 0.0}),
    "alpha 0.25": w4a8(smooth={"alpha": 0.25}),
    "no rotation at all": w4a8(rotate={"skip": True}),
    "rotation offline only": w4a8(rotate={"mode": "identity", "online": False}),
    "full Hadamard everywhere": w4a8(rotate={"mode": "hadamard"}),
    "block Hadamard of 64 everywhere (the w4a8 recipe)": w4a8(rotate={"mode": "block_hadamard"}),
    "rotation by RMS, literal (LRQ-DiT)": w4a8(rotate={"mode": "literal"}),
    "rotation by RMS, quantile": w4a8(rotate={"mode": "quantile"}),
}


def split_at_quantize(recipe: Recipe) -> tuple[tuple[Pass, ...], Quantize]:
    """(the passes before `quantize`, `quantize`) of a recipe."""
    place = quantize_step(recipe)
    step = recipe.passes[place]
    assert isinstance(step, Quantize)
    return recipe.passes[:place], step


def bits_a_weight(reports: Sequence[PassReport]) -> float:
    """What `quantize` says of all that it quantized."""
    return next(report.summary["bits a weight"] for report in reports if report.name == "quantize")


class Bench:
    """The original's pictures, drawn once, and the pipeline to draw others with."""

    def __init__(self, checkpoint: Checkpoint, limit: int, seed: int) -> None:
        self.checkpoint = checkpoint
        self.settings = SamplingSettings(dict(checkpoint.sampling), seed)
        self.prompts = heldout_conditions(checkpoint, limit)
        self.pipeline = checkpoint.load_pipeline()
        self.reference = self.draw(self.pipeline.transformer)

    def draw(self, model: nn.Module) -> list[np.ndarray]:
        self.pipeline.transformer = model
        with torch.no_grad():
            drawn = sample(self.pipeline, self.prompts, self.settings, progress=False)
        return [np.asarray(item.image) for item in drawn]

    def quality(self, model: nn.Module) -> tuple[float, float]:
        """Mean and worst PSNR over the pictures."""
        values = [psnr(a, b) for a, b in zip(self.reference, self.draw(model), strict=True)]
        return float(np.mean(values)), min(values)

    def passes(self, steps: Sequence[Any], statistics: Statistics) -> tuple[nn.Module, float]:
        """The model after the passes, in torch, and bits a weight."""
        model = self.checkpoint.load_model()
        graph = DiTGraph(model, example_inputs(self.checkpoint))
        reports = run_passes(graph, Recipe.from_dict({"passes": list(steps)}, "measured"), statistics)
        return model, bits_a_weight(reports)


def measure_recipe(bench: Bench, name: str, statistics: Path, folder: Path) -> list[str]:
    """One row: compile, prove, compare with torch, draw."""
    engine = folder / name
    began = time.perf_counter()
    result = compile(bench.checkpoint, engine, name, CompileOptions(statistics=statistics, progress=False))
    seconds = time.perf_counter() - began
    sizes, proof = file_sizes(engine, bench.checkpoint), prove_fusion(engine)
    weights = result.engine.files["weights.safetensors"]["bytes"]
    transformer = load_engine(engine)
    inputs = example_inputs(bench.checkpoint)
    agreement = model_agreement(result.engine, inputs)
    if not agreement.holds:
        raise click.ClickException(f"{name}: {agreement}")
    meant = float64_agreement(result.engine, inputs)
    if not meant.holds:
        raise click.ClickException(f"{name}: {meant}")
    mean, worst = bench.quality(transformer)
    shutil.rmtree(engine)
    return [
        name,
        f"{bits_a_weight(result.reports):.2f}",
        f"{mean:.2f}",
        f"{worst:.2f}",
        f"{weights / 1e6:.2f}",
        f"{weights / sizes.original_fp32:.3f}",
        f"{weights / sizes.original_bf16:.3f}",
        f"{len(proof.fused)}/{proof.planned}",
        f"{agreement.plain_error:.0e}",
        f"{agreement.error:.0e}",
        f"{meant.meaning:.0e}",
        f"{seconds:.0f}",
    ]


def table(header: list[str], rows: list[list[str]]) -> None:
    click.echo("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        click.echo("| " + " | ".join(row) + " |")


@click.command()
@click.argument("checkpoint")
@click.option("--limit", default=32, show_default=True, help="Held-out prompts.")
@click.option("--seed", default=1000, show_default=True)
@click.option("--stats", type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`; made if not given.")
@click.option("--only", help="Comma-separated recipes; default: all that come with ditq.")
@click.option("--baselines/--no-baselines", default=True, help="Also measure round-to-nearest.")
@click.option("--ablation", is_flag=True, help="Measure variants of the default recipe instead.")
def main(checkpoint: str, limit: int, seed: int, stats: Path | None, only: str | None, baselines: bool,
         ablation: bool) -> None:  # fmt: skip
    """Print the tables of docs/results.md for CHECKPOINT."""
    opened = Checkpoint.open(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        folder = stats or Path(scratch) / "statistics"
        statistics = Statistics.open(folder, opened.fingerprint()) if stats else calibrate(opened, folder)
        bench = Bench(opened, limit, seed)
        click.echo(f"{checkpoint}: {len(bench.prompts)} held-out prompts, {dict(opened.sampling)}, seeds from {seed}\n")
        variants = {} if not (ablation or baselines) else (ABLATIONS if ablation else BASELINES)
        rows = []
        for name, steps in variants.items():
            model, bits = bench.passes(steps, statistics)
            mean, worst = bench.quality(model)
            rows.append([name, f"{bits:.2f}", f"{mean:.2f}", f"{worst:.2f}"])
            print(rows[-1], file=sys.stderr, flush=True)
        if rows:
            title = "w4a8, one thing changed" if ablation else "round-to-nearest of token linears"
            table([title, "bits a weight", "PSNR, dB", "worst"], rows)
        if ablation:
            return
        click.echo()
        rows = []
        for name in only.split(",") if only else shipped_recipes():
            rows.append(measure_recipe(bench, name, folder, Path(scratch)))
            print(rows[-1], file=sys.stderr, flush=True)
        table(["recipe", "bits a weight", "PSNR, dB", "worst", "weights, MB", "to float32", "to bf16", "fused",
               "torch - ONNX", "up to ties", "in float64", "compile, s"], rows)  # fmt: skip


if __name__ == "__main__":
    main()
