"""ditq inspect: what is in a checkpoint, an engine or a statistics folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ditq.commands import table


@click.command()
@click.argument("what")
@click.option("-r", "--recipe", default="w4a8", show_default=True, help="Show what this recipe would do.")
@click.option("--config", type=click.Path(path_type=Path), help="config.json of a single .safetensors file.")
@click.option("--tokens", type=int, metavar="N", help="Count the cost of pictures of N image tokens, such as 4096.")
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    help="A calibration, which shows the inputs of a model of no known family.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(what: str, recipe: str, config: Path | None, tokens: int | None, stats: Path | None, as_json: bool) -> None:
    """Show a checkpoint's linears by role and what a recipe would do; or an engine's, or a statistics folder's contents.

    \b
    ditq inspect ./FLUX.1-dev --recipe w4a4 --tokens 4096
    """
    from ditq.showing import show

    lines, values = show(what, recipe, config, tokens, stats)
    if as_json:
        click.echo(json.dumps(values, indent=1))
        return
    for item in lines:
        if isinstance(item, str):
            click.echo(item)
        else:
            table(*item)
