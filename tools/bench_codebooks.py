"""Time and memory of fitting each codebook to one large weight, each in a process of its own.

    python -m tools.bench_codebooks --bits 4 --group-size 64

*CPU s* is processor time over all threads: on a machine that is busy with other work it tells more than the clock. *MB above
the weight* is the largest resident memory of the process less what it had before the fit.
"""

from __future__ import annotations

import multiprocessing
import resource
import time

import click
import torch

from ditq.numerics.codebook import CODEBOOKS
from tools.measure_recipes import table


def fit(codebook: str, bits: int, group_size: int, rows: int, columns: int, threads: int) -> tuple[float, float]:
    """(CPU seconds, bytes) of one fit to normal weights with the importance of a calibrated input."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    importance = torch.rand(columns, generator=generator) + 0.01
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    CODEBOOKS[codebook](weight, bits, importance=importance, **({"group_size": group_size} if group_size else {}))
    return time.process_time() - began, 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@click.command(help=__doc__)
@click.option("--bits", "all_bits", multiple=True, type=int, default=(4,), show_default=True)
@click.option("--group-size", default=0, show_default=True, help="Columns that share a scale; 0 is the whole row.")
@click.option("--rows", default=3072, show_default=True)
@click.option("--columns", default=12288, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CODEBOOKS)), help="Codebooks; default: all.")
def main(
    all_bits: tuple[int, ...], group_size: int, rows: int, columns: int, threads: int, only: tuple[str, ...]
) -> None:
    rows_out = []
    for bits in all_bits:
        for name in only or CODEBOOKS:
            if CODEBOOKS[name].refusal(bits, group_size):
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, extra = pool.apply(fit, (name, bits, group_size, rows, columns, threads))
            rows_out.append([name, str(bits), str(group_size), f"{seconds:.0f}", f"{extra / 1e6:.0f}"])
            click.echo(" ".join(rows_out[-1]), err=True)
    table(["codebook", "bits", "group", "CPU s", "MB above the weight"], rows_out)


if __name__ == "__main__":
    main()
