"""ditq evaluate: what an engine lost."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ditq.commands import DEVICE_HELP, SEED, print_evaluation


@click.command()
@click.argument("engine")
@click.option("--against", help="The original checkpoint; default: where the engine was compiled from.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts: a file, or vbench, mini, mini-heldout; default: held-out ones.",
)
@click.option("--limit", default=32, show_default=True, type=click.IntRange(min=1), help="At most so many prompts.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--target", default="auto", show_default=True, help="Run the engine so; see `ditq targets`.")
@click.option("--seed", default=1000, show_default=True, type=SEED, help="Seed of the first prompt's noise.")
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--fail-below", metavar="METRIC=NUMBER,...", help="Exit with 1 if a metric is worse, e.g. psnr=22.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where the report goes; default: the engine folder.")
def evaluate(engine: str, against: str | None, prompts: Path | None, limit: int, steps: int | None, target: str,
             seed: int, device: str, fail_below: str | None, out: Path | None) -> None:  # fmt: skip
    """Measure what ENGINE lost: same prompts, same seeds, picture by picture; writes report.html and report.json.

    \b
    ditq evaluate engine --against mini --fail-below psnr=22
    """
    from ditq.report.engine_report import report_on
    from ditq.report.evaluation import parse_thresholds

    thresholds = parse_thresholds(fail_below) if fail_below else {}
    evaluation = report_on(engine, against, conditions=prompts, limit=limit, steps=steps, seed=seed, target=target,
                           where=out, device=device)  # fmt: skip
    print_evaluation(evaluation)
    click.echo(f"report in {Path(out or engine) / 'report.html'}")
    violated = evaluation.fail_below(thresholds)
    for line in violated:
        click.echo(f"below the limit: {line}", err=True)
    if violated:
        sys.exit(1)
