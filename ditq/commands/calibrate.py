"""ditq calibrate: the statistics of every linear's input."""

from __future__ import annotations

from pathlib import Path

import click

from ditq.commands import DEVICE_HELP, SEED, arguments_of


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The statistics folder to make.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts or labels, one a line: .txt, .csv, .jsonl; or a set's name: vbench, mini, mini-heldout.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most so many of them.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--bins", default=4, show_default=True, type=click.IntRange(min=1), help="Timestep bins.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An argument of the pipeline's call.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--moments", default="auto", show_default=True, type=click.Choice(("auto", "bins", "all")),
              help="Second moments by timestep bin, or over all; auto: by bin where they fit in 2 GiB.")  # fmt: skip
@click.option(
    "--modulation-conditions",
    default=64,
    show_default=True,
    type=click.IntRange(min=0),
    help="Prompts or labels whose modulation is read, most of them without drawing; 0: those that are drawn.",
)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--step-weights", is_flag=True, help="Also measure what an error at each step is worth.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted calibration stopped.")
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
def calibrate(checkpoint: str, out: Path, prompts: Path | None, limit: int | None, steps: int | None, bins: int,
              settings: tuple[str, ...], seed: int, moments: str, modulation_conditions: int, device: str, step_weights: bool,
              resume: bool, force: bool) -> None:  # fmt: skip
    """Run CHECKPOINT's real pipeline on prompts and keep the statistics of every linear's input.

    \b
    ditq calibrate ./PixArt-Sigma -o stats --prompts prompts.txt --steps 20
    """
    from ditq.calibration.calibrate import calibrate as run
    from ditq.checkpoint import Checkpoint

    opened = Checkpoint.open(checkpoint)
    found = run(opened, out, conditions=prompts, steps=steps, bins=bins, seed=seed, limit=limit,
                arguments=arguments_of(settings), moments=moments, modulation_conditions=modulation_conditions, device=device,
                step_weights=step_weights, resume=resume, force=force)  # fmt: skip
    count, steps_run = found.metadata["condition_count"], found.metadata["steps"]
    more = found.metadata.get("modulation_conditions")
    beside = f", modulation over {more}" if more is not None else ""
    click.echo(f"{len(found.groups)} inputs over {count} conditions of {steps_run} steps, in {found.bins} bins{beside}")
    click.echo(f"statistics in {out}; next: ditq compile {checkpoint} -o engine --stats {out}")
