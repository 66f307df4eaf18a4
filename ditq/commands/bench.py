"""ditq bench: how long a call takes, and where the time goes."""

from __future__ import annotations

import json

import click

from ditq.commands import DECODED_HELP, table


@click.command()
@click.argument("engine")
@click.option("--against", help="The original checkpoint; default: where the engine was compiled from.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads; default: all.")
@click.option("--decoded", is_flag=True, help=DECODED_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(engine: str, against: str | None, rounds: int, threads: int | None, decoded: bool, as_json: bool) -> None:
    """Time one denoiser call of ENGINE against the original, in turns: in torch and ONNX Runtime float32 on the CPU, or on the
    GPU that the engine runs on in torch bfloat16, compiled and not; and say where the engine's time goes.
    """
    from ditq.report.engine_report import benchmark

    rows = benchmark(engine, against, rounds=rounds, threads=threads, decoded=decoded)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table(["", "median ms", "fastest", "slowest", f"times as fast as {rows[0]['name']}"],
           [[r["name"], *(f"{r[k]:.1f}" for k in ("median_ms", "fastest_ms", "slowest_ms")),
             f"{r['times_as_fast']:.2f}"] for r in rows])  # fmt: skip
    own = rows[-1]
    if "shares" in own:
        found = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in own["shares"].items())
        click.echo(f"{own['name']}, by {own['target']}: {found}")
    if "gpu_bytes" in own:
        click.echo(f"{own['name']}: {own['gpu_bytes'] / 1e6:.0f} MB of GPU memory")
