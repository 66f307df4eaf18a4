"""The commands, one file each: parse, call the API, print. Here is what several of them share."""

from __future__ import annotations

import json
from typing import Any

import click

from ditq.errors import DitqError
from ditq.given import MOST_SEED

SEED = click.IntRange(min=0, max=MOST_SEED)
DEVICE_HELP = (
    "Where the model draws and is read, and weights are rounded: cpu, cuda or cuda:N; auto: a GPU if there is one, where "
    "the model is in bfloat16."
)
GPU_HELP = "A kind of GPU to build a plan for, e.g. sm89; may be repeated.  [default: this one; else sm80, sm89, sm120]"
DECODED_HELP = (
    "Decode weights once, when the engine is loaded: more of the GPU's memory, fewer ms a call (target cuda)."
)
SIZES_HELP = (
    "Sizes that plans take, smallest:usual:largest by axis, e.g. batch=1:2:4,image_tokens=4096; picture=ROWSxCOLUMNS of "
    "image tokens where a plan is for one picture."
)


def arguments_of(settings: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON where it can be read so, else text."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise DitqError(f"--set {setting}: write NAME=VALUE, e.g. --set guidance_scale=4.5")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            values[name] = value
    return values


def table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_evaluation(evaluation: Any) -> None:
    from ditq.report.evaluation import METRICS

    for name, value in evaluation.summary.items():
        if value is not None:
            click.echo(f"{METRICS[name].label:44s} {value:.4g}")
    for line in (*evaluation.defects, *evaluation.notes):
        click.echo(f"note: {line}")
