"""ditq plan: TensorRT plans of an engine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ditq.commands import GPU_HELP, SIZES_HELP


@click.command(name="plan")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--gpu", "gpus", metavar="KIND", multiple=True, help=GPU_HELP)
@click.option("--sizes", metavar="SIZES", help=SIZES_HELP)
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
