"""ditq recipes, passes, families and targets: what there is."""

from __future__ import annotations

import click

from ditq.commands import table


@click.command()
def recipes() -> None:
    """List the recipes that come with ditq."""
    from ditq.recipe import load_recipe, shipped_recipes

    table(["recipe", "what it is"], [[name, load_recipe(name).description] for name in shipped_recipes()])


@click.command()
@click.argument("name", required=False)
def passes(name: str | None) -> None:
    """List the passes, or the settings of one."""
    from ditq.showing import show_passes

    for item in show_passes(name):
        if isinstance(item, str):
            click.echo(item)
        else:
            table(*item)


@click.command()
def families() -> None:
    """List the model families whose inputs ditq can make up by itself."""
    from ditq.families import families as known

    rows = [[f.name, ", ".join(f.class_names), f.pipeline, f.condition] for f in known().values()]
    table(["family", "classes", "pipeline", "asked by"], rows)


@click.command()
def targets() -> None:
    """List the export targets and whether they work here."""
    from ditq.showing import show_targets

    table(*show_targets())
