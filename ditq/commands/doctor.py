"""ditq doctor: what works here, and what an engine really runs."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("engine", required=False)
@click.option(
    "--float64",
    is_flag=True,
    help="Also compute the ENGINE's graph and torch in float64; 16 bytes of memory a parameter.",
)
def doctor(engine: str | None, float64: bool) -> None:
    """Say what is installed and which targets work here; on an ENGINE, which planned low-bit products really are."""
    from ditq.showing import diagnose

    lines, healthy = diagnose(engine, float64)
    for line in lines:
        click.echo(line)
    if not healthy:
        sys.exit(1)
