"""What NVFP4 loses beside integers of 4 bits, with each rotation and rounding, in the torch meaning.

    python -m tools.measure_nvfp4 mini --stats stats --limit 16

Original and quantized model draw the same held-out prompts from the same seeds; PSNR is the mean over pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.passes import Pass
from ditq.recipe import load_recipe
from tools.measure_recipes import MODULATION, Bench, table

GPTQ: dict[str, Any] = {"rounding": "gptq", "damping": 0.05, "refine": 4}
NEAREST: dict[str, Any] = {"rounding": "nearest", "weighted": False, "bias_correction": False}


def nvfp4(rotation: dict[str, Any] | None, smooth: bool = True, **quantize: Any) -> list[Any]:
    """The passes of the shipped w4a4 with NVFP4 in the place of its integers."""
    steps: list[Any] = [{"smooth": {"alpha": 0.5, "centre": True}}] if smooth else []
    steps += [] if rotation is None else [{"rotate": rotation}]
    return [*steps, {"quantize": {"format": "nvfp4", "rules": [MODULATION], **quantize}}]


VARIANTS: dict[str, list[Any]] = {
    "nvfp4, round to nearest, nothing else": nvfp4(None, smooth=False, **NEAREST),
    "nvfp4, gptq, no smoothing": nvfp4(None, smooth=False, **GPTQ),
    "nvfp4, gptq, smooth": nvfp4(None, **GPTQ),
    "nvfp4, gptq, smooth, blocks of 16 rotated": nvfp4({"mode": "block_hadamard", "block": 16}, **GPTQ),
    "nvfp4, gptq, smooth, blocks of 64 rotated": nvfp4({"mode": "block_hadamard", "block": 64}, **GPTQ),
    "nvfp4, gptq, smooth, all channels rotated": nvfp4({"mode": "hadamard"}, **GPTQ),
    "nvfp4, round to nearest, smooth": nvfp4(None, **NEAREST),
    "nvfp4, round to nearest, smooth, blocks of 16 rotated": nvfp4({"mode": "block_hadamard", "block": 16}, **NEAREST),
    "nvfp4, round to nearest, smooth, blocks of 64 rotated": nvfp4({"mode": "block_hadamard", "block": 64}, **NEAREST),
}


@click.command()
@click.argument("checkpoint")
@click.option("--stats", required=True, type=click.Path(path_type=Path), help="Statistics of `ditq calibrate`.")
@click.option("--limit", default=16, show_default=True, help="Held-out prompts.")
@click.option("--seed", default=1000, show_default=True)
@click.option("--only", default="", help="Only variants whose name holds this.")
def main(checkpoint: str, stats: Path, limit: int, seed: int, only: str) -> None:
    """Print the table of docs/results/quantization.md for CHECKPOINT."""
    opened = Checkpoint.open(checkpoint)
    statistics, bench = Statistics.open(stats, opened.fingerprint()), Bench(opened, limit, seed)
    shipped: list[Pass | Any] = [{step.name: step.settings()} for step in load_recipe("w4a4").passes]
    rows = []
    for name, steps in {"w4a4 as shipped, integers": shipped, **VARIANTS}.items():
        if only in name:
            model, bits = bench.passes(steps, statistics)
            mean, worst = bench.quality(model)
            rows.append([name, f"{bits:.2f}", f"{mean:.2f}", f"{worst:.2f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    table(["passes", "bits a weight", "PSNR, dB", "worst"], rows)


if __name__ == "__main__":
    main()
