"""python -m tools.peers: measure ditq beside its peers and print, or write into docs/peers.md, one table a checkpoint."""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tools.peers.bench import Bench, Place
from tools.peers.measure import key, run_row, slug
from tools.peers.page import fill, joined, table, write_json
from tools.peers.row import Row, rows

CHECKPOINTS = ("mini", "mini-pixart")


def chosen(patterns: str | None) -> dict[str, Row]:
    """Rows whose name, or whose peer's name, matches one of the comma-separated globs."""
    if patterns is None:
        return rows()
    wanted = [pattern.strip().lower() for pattern in patterns.split(",")]
    found = {
        name: row
        for name, row in rows().items()
        if any(fnmatch.fnmatchcase(text.lower(), pattern) for text in (name, row.peer) for pattern in wanted)
    }
    if not found:
        raise click.ClickException(f"no row matches {patterns!r}; see --list")
    return found


def cached(path: Path, wanted: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("key") == wanted else None


@click.command()
@click.option("--checkpoint", multiple=True, help="A pipeline folder or built-in name; may be repeated. Default: both.")
@click.option("--planted/--as-is", default=None, help="Only with, or only without, planted outliers. Default: both.")
@click.option("--rows", "patterns", help="Comma-separated globs of rows or peers, e.g. 'ditq,SVDQuant*'.")
@click.option("--limit", default=64, show_default=True, help="Held-out captions.")
@click.option("--batch", default=16, show_default=True, help="Pictures that are drawn at a time.")
@click.option("--work", default="peers-work", show_default=True, type=click.Path(), help="Where results are kept.")
@click.option("--stats", multiple=True, help="CHECKPOINT=FOLDER: statistics of `ditq calibrate`; made if not given.")
@click.option("--again", is_flag=True, help="Measure the chosen rows anew.")
@click.option("--only-table", is_flag=True, help="Measure nothing; make the table of what is there.")
@click.option(
    "--page",
    type=click.Path(path_type=Path),
    help="Put the rows into the tables of this page, and into a .json beside it; its other rows stay.",
)
@click.option("--list", "listing", is_flag=True, help="List the rows and stop.")
def main(checkpoint: tuple[str, ...], planted: bool | None, patterns: str | None, limit: int, batch: int, work: str,
         stats: tuple[str, ...], again: bool, only_table: bool, page: Path | None, listing: bool) -> None:  # fmt: skip
    """Measure ditq and its peers. Finished rows are kept: run it again to go on, or with other --rows to add some."""
    if listing:
        click.echo("\n".join(rows()))
        return
    names = checkpoint or CHECKPOINTS
    folders = dict(item.split("=", 1) for item in stats)
    context = multiprocessing.get_context("forkserver")  # each row forks from a process that has only imported things
    context.set_forkserver_preload(["diffusers.pipelines.flux", "ditq.compiler", "tools.peers.measure"])
    for name in names:
        for variant in (False, True) if planted is None else (planted,):
            place = Place(name, variant, limit, batch, str(Path(work).absolute()), folders.get(name))
            results = run_variant(context, place, chosen(patterns), again, only_table)
            if page is not None:
                results = joined(page.with_suffix(".json"), place.variant, results, list(rows()))
            text = table(results)
            click.echo(f"\n## {place.variant}, {limit} captions\n\n{text}")
            if page is not None:
                write_json(page.with_suffix(".json"), place.variant, results)
                if not fill(page, place.variant, text):
                    click.echo(f"{page}: has no markers for {place.variant}", err=True)


def run_variant(
    context: Any, place: Place, wanted: dict[str, Row], again: bool, only_table: bool
) -> list[dict[str, Any]]:
    """The results of all wanted rows on one checkpoint, measured or read."""
    bench = Bench(place)
    if not only_table:
        bench.prepare()
    folder = place.folder / f"rows-{place.limit}"
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for number, (name, row) in enumerate(wanted.items()):
        path = folder / f"{slug(name)}.json"
        found = None if again else cached(path, key(row, bench))
        if found is None and not only_table:
            began = time.perf_counter()
            process = context.Process(target=run_row, args=(name, asdict(place), str(path)))
            process.start()
            process.join()
            found = cached(path, key(row, bench))
            if found is None:
                found = {"name": name, "peer": row.peer, "failed": f"its process ended with code {process.exitcode}"}
            seconds = time.perf_counter() - began
            said = found.get("failed") or f"{found['psnr']:.2f} dB at {found['bits']:.2f} bits"
            print(f"{place.variant} {number + 1}/{len(wanted)} {name}: {said} ({seconds:.0f} s)", file=sys.stderr)
        if found is not None:
            results.append(found)
    return results


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
