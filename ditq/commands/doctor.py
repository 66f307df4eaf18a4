"""ditq doctor: what works here, and what an engine really runs."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("engine", required=False)
def doctor(engine: str | None) -> None:
    """Say what is installed and which targets work here; on an ENGINE, which planned low-bit products really are."""
    from ditq.showing import diagnose

    lines, healthy = diagnose(engine)
    for line in lines:
        click.echo(line)
    if not healthy:
        sys.exit(1)
