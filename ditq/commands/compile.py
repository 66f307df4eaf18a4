"""ditq compile: calibrate, run the recipe, write the engine and its report."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ditq.commands import DEVICE_HELP, GPU_HELP, SEED, SIZES_HELP, print_evaluation, table
from ditq.errors import DitqError

if TYPE_CHECKING:
    from ditq.checkpoint import Checkpoint


@click.command(name="compile")
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The engine folder to make.")
@click.option("-r", "--recipe", default="w4a8", show_default=True, help="A shipped recipe's name or a YAML file.")
@click.option(
    "--budget",
    metavar="BUDGET",
    help="Choose formats so that size=4.2MB, bits=3.5 or psnr>=24 holds; or attentions: attention_macs=0.3.",
)
@click.option(
    "--candidates",
    metavar="LIST",
    help="What --budget chooses from: w2 .. w8, keep, in groups w4g64, with a branch w4r8 or w4r2%.  [default: w2 .. w6, w8]",
)
@click.option("-t", "--target", default="onnxruntime-cpu", show_default=True, help="See `ditq targets`.")
@click.option("--gpu", "gpus", metavar="KIND", multiple=True, help=GPU_HELP)
@click.option("--sizes", metavar="SIZES", help=SIZES_HELP)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts to calibrate on: .txt, .csv, .jsonl; or a set's name: vbench, mini, mini-heldout.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most so many of the prompts.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps of calibration.")
@click.option("--stats", type=click.Path(path_type=Path), help="Statistics from `ditq calibrate`, instead of prompts.")
@click.option("--evaluate", "evaluated", default=4, show_default=True, type=click.IntRange(min=0),
              help="Held-out prompts for the report; 0 makes none.")  # fmt: skip
@click.option(
    "--cache-text/--no-cache-text",
    default=True,
    show_default=True,
    help="Compute what sees only the text once for a prompt, not at every step; exact.",
)
@click.option("--config", type=click.Path(path_type=Path), help="config.json of a single .safetensors file.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--offload", default="auto", show_default=True, type=click.Choice(["auto", "disk", "none"]),
              help="Where float32 weights stand during the passes; auto: on disk if over half of free memory.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on where an interrupted compile to the same folder stopped.")
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
def compile_command(checkpoint: str, out: Path, recipe: str, budget: str | None, candidates: str | None, target: str,
                    gpus: tuple[str, ...], sizes: str | None, prompts: Path | None, limit: int | None,
                    steps: int | None, stats: Path | None, evaluated: int, cache_text: bool, config: Path | None,
                    seed: int, device: str, offload: str, resume: bool, force: bool) -> None:  # fmt: skip
    """Compile CHECKPOINT (a folder, a .safetensors file, or `mini`) into an engine folder with a report.

    \b
    ditq compile mini -o engine
    ditq compile ./FLUX.1-dev -o engine --recipe w4a8 --prompts prompts.txt --steps 20
    ditq compile mini -o engine --budget size=4MB
    ditq compile ./PixArt-Sigma -o engine --budget attention_macs=0.3
    ditq compile mini -o engine --target tensorrt --gpu sm89
    """
    from ditq import processes
    from ditq.budget.request import Budget
    from ditq.checkpoint import Checkpoint
    from ditq.compiler import CompileOptions, compile, take_part
    from ditq.export.targets import target as export_target
    from ditq.report.budget_files import front_table, write_budget
    from ditq.report.engine_report import report_on

    if candidates is not None and budget is None:
        raise DitqError("--candidates says what --budget chooses from; give a budget too, e.g. --budget bits=3.5")
    asked = None if budget is None else Budget.parse(budget, candidates)
    options = CompileOptions(target=target, conditions=prompts, limit=limit, steps=steps, statistics=stats,
                             budget=asked, seed=seed, resume=resume, force=force, cache_text=cache_text, gpus=gpus,
                             sizes=sizes, device=device, offload=offload)  # fmt: skip
    opened = Checkpoint.open(checkpoint, config)
    if not processes.is_first():
        take_part(opened, recipe, replace(options, progress=False))
        return
    result = compile(opened, out, recipe, options)
    for found in (report.to_json() for report in result.reports):
        if found.get("front"):
            write_budget(out, found)
            table(*front_table(found))
        for line in found.get("notes", ()):
            click.echo(f"note: {line}")
    for report in result.reports:
        said = ", ".join(f"{key} {_short(value)}" for key, value in report.summary.items())
        click.echo(f"{report.name:10s} {said}")
    if cache_text:
        click.echo(f"{'text':10s} {_said_of_text(len(result.text_sites))}")
    for plan in result.plans:
        click.echo(f"{'plan':10s} {plan}")
    if not result.plans and export_target(target).plans:
        click.echo(f"{'plan':10s} none: no TensorRT is installed; later: ditq plan {out}")
    laps = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    if result.offloaded:
        click.echo(
            f"{'weights':10s} stood on disk; what of them was in memory because there was room counts in the peak"
        )
    click.echo(f"{'time':10s} {laps}; peak memory {result.peak_memory / 2**30:.1f} GiB")
    if evaluated and opened.pipeline_root is not None:
        print_evaluation(report_on(out, opened, limit=evaluated, device=device, speed=False))
    click.echo(f"engine in {out}; next: " + _next(out, checkpoint, opened))


def _said_of_text(sites: int) -> str:
    if sites:
        return f"{sites} linears see only the text and run once for a prompt"
    return "no keys and values are made of the text alone, so nothing is cached between steps"


def _next(out: str | Path, given: str, checkpoint: Checkpoint) -> str:
    """What to do with the engine: words for a shell."""
    from ditq.calibration.calibrate import pipeline_class
    from ditq.calibration.sampling import condition_kind
    from ditq.checkpoint import BUILT_IN

    if checkpoint.pipeline_root is None:
        return f"ditq.load_engine({str(out)!r}), in the pipeline that its transformer is of"
    if condition_kind(pipeline_class(checkpoint)) == "class":
        drawn = "0"
    else:
        drawn = '"smirking face, noto"' if checkpoint.name.startswith("mini") else '"your prompt"'
    around = "" if checkpoint.name in BUILT_IN else f" --checkpoint {shlex.quote(given)}"
    return f"ditq sample {shlex.quote(str(out))} {drawn}{around} -o sample.png"


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
