"""The command line: parse, call the API, print. Every problem of the user's is one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ditq.errors import DitqError, Interrupted

# Set before torch is loaded: threads that wait asleep. Spinning ones cost many times the work itself where other programs
# share the processor and the operators are small.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = "interrupted; nothing was left half-written"
SEED = click.IntRange(min=0, max=2**62)  # seed + number of the prompt must fit 64 bits
_DEVICE_HELP = (
    "Where the model draws and is read, and weights are rounded: cpu, cuda or cuda:N; auto: a GPU if there is one, where "
    "the model is in bfloat16."
)
_GPU_HELP = (
    "A kind of GPU to build a plan for, e.g. sm89; may be repeated.  [default: this one; else sm80, sm89, sm120]"
)
_SIZES_HELP = (
    "Sizes that plans take, smallest:usual:largest by axis, e.g. batch=1:2:4,image_tokens=4096; picture=ROWSxCOLUMNS of "
    "image tokens where a plan is for one picture."
)
PICTURES = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class _Commands(click.Group):
    """Commands in the order in which they are written below, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ditq")
def cli() -> None:
    """Compress a diffusion transformer and get an engine that really runs low-bit.

    \b
    ditq compile mini -o engine                   compile the built-in checkpoint
    ditq sample engine "smirking face, noto"     draw with the engine
    ditq evaluate engine --against mini           how much was lost
    """


@cli.command(name="compile")
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The engine folder to make.")
@click.option("-r", "--recipe", default="w4a8", show_default=True, help="A shipped recipe's name or a YAML file.")
@click.option(
    "--budget",
    metavar="BUDGET",
    help="Choose formats so that size=4.2MB, bits=3.5 or psnr>=24 holds; or attentions: attention_macs=0.3.",
)
@click.option(
    "--candidates", metavar="LIST", help="What --budget chooses from: w2 .. w8, keep.  [default: w2 .. w6, w8]"
)
@click.option("-t", "--target", default="onnxruntime-cpu", show_default=True, help="See `ditq targets`.")
@click.option("--gpu", "gpus", metavar="KIND", multiple=True, help=_GPU_HELP)
@click.option("--sizes", metavar="SIZES", help=_SIZES_HELP)
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts to calibrate on: .txt, .csv or .jsonl.")
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
@click.option("--device", default="auto", show_default=True, help=_DEVICE_HELP)
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
            _table(*front_table(found))
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
        _print_evaluation(report_on(out, opened, limit=evaluated, device=device, speed=False))
    click.echo(f"engine in {out}; next: ditq sample {out} " + _example(opened))


def _said_of_text(sites: int) -> str:
    if sites:
        return f"{sites} linears see only the text and run once for a prompt"
    return "no keys and values are made of the text alone, so nothing is cached between steps"


@cli.command()
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The statistics folder to make.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts or labels, one a line: .txt, .csv, .jsonl.")
@click.option("--limit", type=click.IntRange(min=1), help="Use at most so many of them.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--bins", default=4, show_default=True, type=click.IntRange(min=1), help="Timestep bins.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An argument of the pipeline's call.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--moments", default="auto", show_default=True, type=click.Choice(("auto", "bins", "all")),
              help="Second moments by timestep bin, or over all; auto: by bin where they fit in 2 GiB.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help=_DEVICE_HELP)
@click.option("--step-weights", is_flag=True, help="Also measure what an error at each step is worth.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted calibration stopped.")
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
def calibrate(checkpoint: str, out: Path, prompts: Path | None, limit: int | None, steps: int | None, bins: int,
              settings: tuple[str, ...], seed: int, moments: str, device: str, step_weights: bool, resume: bool,
              force: bool) -> None:  # fmt: skip
    """Run CHECKPOINT's real pipeline on prompts and keep the statistics of every linear's input.

    \b
    ditq calibrate ./PixArt-Sigma -o stats --prompts prompts.txt --steps 20
    """
    from ditq.calibration.calibrate import calibrate as run
    from ditq.checkpoint import Checkpoint

    opened = Checkpoint.open(checkpoint)
    found = run(opened, out, conditions=prompts, steps=steps, bins=bins, seed=seed, prompts_limit=limit,
                arguments=_arguments(settings), moments=moments, device=device, step_weights=step_weights, resume=resume,
                force=force)  # fmt: skip
    count, steps_run = found.metadata["condition_count"], found.metadata["steps"]
    click.echo(f"{len(found.groups)} inputs over {count} conditions of {steps_run} steps, in {found.bins} bins")
    click.echo(f"statistics in {out}; next: ditq compile {checkpoint} -o engine --stats {out}")


@cli.command()
@click.argument("engine")
@click.argument("prompt")
@click.option("-o", "--out", default="sample.png", show_default=True, type=click.Path(path_type=Path))
@click.option("--against", help="Draw the original beside it: a checkpoint.")
@click.option("--checkpoint", help="The pipeline around the engine; default: where it was compiled from.")
@click.option("--target", default="auto", show_default=True, help="Run it so; see `ditq targets`.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An argument of the pipeline's call.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--force", is_flag=True, help="Replace the picture if it exists.")
def sample(engine: str, prompt: str, out: Path, against: str | None, checkpoint: str | None, target: str,
           steps: int | None, settings: tuple[str, ...], seed: int, force: bool) -> None:  # fmt: skip
    """Draw PROMPT (or a class label) with ENGINE.

    \b
    ditq sample engine "smirking face, noto" -o face.png --against mini
    """
    from ditq.folders import check_output
    from ditq.report.engine_report import draw

    check_output(out, force)
    _check_picture(out)
    picture = draw(engine, prompt, checkpoint=checkpoint, against=against, target=target, steps=steps,
                   arguments=_arguments(settings), seed=seed)  # fmt: skip
    _save_picture(picture, out)
    click.echo(f"picture in {out}")


@cli.command()
@click.argument("engine")
@click.option("--against", help="The original checkpoint; default: where the engine was compiled from.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts; default: held-out ones.")
@click.option("--limit", default=32, show_default=True, type=click.IntRange(min=1), help="At most so many prompts.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--target", default="auto", show_default=True, help="Run the engine so; see `ditq targets`.")
@click.option("--seed", default=1000, show_default=True, type=SEED, help="Seed of the first prompt's noise.")
@click.option("--device", default="auto", show_default=True, help=_DEVICE_HELP)
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
    _print_evaluation(evaluation)
    click.echo(f"report in {Path(out or engine) / 'report.html'}")
    violated = evaluation.fail_below(thresholds)
    for line in violated:
        click.echo(f"below the limit: {line}", err=True)
    if violated:
        sys.exit(1)


@cli.command()
@click.argument("engine")
@click.option("--against", help="The original checkpoint; default: where the engine was compiled from.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads; default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(engine: str, against: str | None, rounds: int, threads: int | None, as_json: bool) -> None:
    """Time one denoiser call of ENGINE against the original in torch and in ONNX Runtime float32, in turns; and say where
    the engine's time goes, by kinds of work.
    """
    from ditq.report.engine_report import benchmark

    rows = benchmark(engine, against, rounds=rounds, threads=threads)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    _table(["", "median ms", "fastest", "slowest", "times as fast as torch"],
           [[r["name"], *(f"{r[k]:.1f}" for k in ("median_ms", "fastest_ms", "slowest_ms")),
             f"{r['times_as_fast']:.2f}"] for r in rows])  # fmt: skip
    own = rows[-1]
    if "shares" in own:
        found = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in own["shares"].items())
        click.echo(f"{own['name']}, by {own['target']}: {found}")
    if "gpu_bytes" in own:
        click.echo(f"{own['name']}: {own['gpu_bytes'] / 1e6:.0f} MB of GPU memory")


@cli.command()
@click.argument("what")
@click.option("-r", "--recipe", default="w4a8", show_default=True, help="Show what this recipe would do.")
@click.option("--config", type=click.Path(path_type=Path), help="config.json of a single .safetensors file.")
@click.option("--tokens", type=int, metavar="N", help="Count the cost of pictures of N image tokens, such as 4096.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(what: str, recipe: str, config: Path | None, tokens: int | None, as_json: bool) -> None:
    """Show a checkpoint's linears by role and what a recipe would do; or an engine's, or a statistics folder's contents.

    \b
    ditq inspect ./FLUX.1-dev --recipe w4a4 --tokens 4096
    """
    from ditq.showing import show

    lines, values = show(what, recipe, config, tokens)
    if as_json:
        click.echo(json.dumps(values, indent=1))
        return
    for item in lines:
        if isinstance(item, str):
            click.echo(item)
        else:
            _table(*item)


@cli.command(name="plan")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--gpu", "gpus", metavar="KIND", multiple=True, help=_GPU_HELP)
@click.option("--sizes", metavar="SIZES", help=_SIZES_HELP)
def plan_command(engine: Path, gpus: tuple[str, ...], sizes: str | None) -> None:
    """Build TensorRT plans of an ENGINE that was compiled with --target tensorrt; no GPU is needed.

    \b
    ditq plan engine --gpu sm89 --gpu sm120
    ditq plan engine --sizes batch=1:2:2,image_tokens=1024:4096:4096
    """
    from ditq.export import Engine
    from ditq.export.plans.make import make_plans

    _, made = make_plans(Engine.open(engine), gpus, sizes)
    for plan in made:
        click.echo(str(plan))
    if not all(plan.proof.complete for plan in made):
        sys.exit(1)


@cli.command()
@click.argument("engine", required=False)
def doctor(engine: str | None) -> None:
    """Say what is installed and which targets work here; on an ENGINE, which planned low-bit products really are."""
    from ditq.showing import diagnose

    lines, healthy = diagnose(engine)
    for line in lines:
        click.echo(line)
    if not healthy:
        sys.exit(1)


@cli.command()
def recipes() -> None:
    """List the recipes that come with ditq."""
    from ditq.recipe import load_recipe, shipped_recipes

    _table(["recipe", "what it is"], [[name, load_recipe(name).description] for name in shipped_recipes()])


@cli.command()
@click.argument("name", required=False)
def passes(name: str | None) -> None:
    """List the passes, or the settings of one."""
    from ditq.showing import show_passes

    for item in show_passes(name):
        if isinstance(item, str):
            click.echo(item)
        else:
            _table(*item)


@cli.command()
def families() -> None:
    """List the model families whose inputs ditq can make up by itself."""
    from ditq.families import families as known

    rows = [[f.name, ", ".join(f.class_names), f.pipeline, f.condition] for f in known().values()]
    _table(["family", "classes", "pipeline", "asked by"], rows)


@cli.command()
def targets() -> None:
    """List the export targets and whether they work here."""
    from ditq.showing import show_targets

    _table(*show_targets())


def _print_evaluation(evaluation: Any) -> None:
    from ditq.report.evaluation import METRICS

    for name, value in evaluation.summary.items():
        if value is not None:
            click.echo(f"{METRICS[name].label:44s} {value:.4g}")
    for line in (*evaluation.defects, *evaluation.notes):
        click.echo(f"note: {line}")


def _example(checkpoint: Any) -> str:
    prompt = '"smirking face, noto"' if checkpoint.name.startswith("mini") else '"your prompt"'
    return prompt + " -o sample.png"


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _arguments(settings: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it can be read so, else text."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise DitqError(f"--set {setting}: write NAME=VALUE, e.g. --set guidance_scale=4.5")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _check_picture(out: Path) -> None:
    if out.suffix.lower() not in PICTURES:
        raise DitqError(f"{out}: pictures are written as .png, .jpg or .webp; give it such a name")
    if out.is_dir():
        raise DitqError(f"{out}: is a folder; give the name of a picture")


def _save_picture(picture: Any, out: Path) -> None:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        picture.save(partial, format=PICTURES[out.suffix.lower()])
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    try:
        code = cli.main(arguments, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.exceptions.Abort, KeyboardInterrupt) as error:  # click turns the one into the other
        interruption = error.__cause__ if isinstance(error, click.exceptions.Abort) else error
        _fail(str(interruption) if isinstance(interruption, Interrupted) else INTERRUPTED)
    except DitqError as error:
        _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for every command
            raise
        _fail(
            f"not enough memory on the GPU: {str(error).splitlines()[0]} Give --device cpu, or close what else uses it"
        )
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another file or folder"
        _fail(f"{place}{error.strerror}; {advice}")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
