"""ditq sample: a picture drawn with an engine, or two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditq.commands import DECODED_HELP, SEED, arguments_of
from ditq.errors import DitqError

DEVICE_HELP = "Where the original and the rest of the pipeline run, as in `ditq evaluate`; auto: a GPU if there is one."
PICTURES = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@click.command()
@click.argument("engine")
@click.argument("prompt")
@click.option("-o", "--out", default="sample.png", show_default=True, type=click.Path(path_type=Path))
@click.option("--against", help="Draw the original beside it: a checkpoint.")
@click.option("--checkpoint", help="The pipeline around the engine; default: where it was compiled from.")
@click.option("--target", default="auto", show_default=True, help="Run it so; see `ditq targets`.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An argument of the pipeline's call.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--decoded", is_flag=True, help=DECODED_HELP)
@click.option("--force", is_flag=True, help="Replace the picture if it exists.")
def sample(engine: str, prompt: str, out: Path, against: str | None, checkpoint: str | None, target: str, steps: int | None,
           settings: tuple[str, ...], seed: int, device: str, decoded: bool, force: bool) -> None:  # fmt: skip
    """Draw PROMPT (or a class label) with ENGINE.

    \b
    ditq sample engine "smirking face, noto" -o face.png --against mini
    """
    from ditq.folders import check_output
    from ditq.report.engine_report import draw

    check_output(out, force)
    _check_picture(out)
    picture = draw(engine, prompt, checkpoint=checkpoint, against=against, target=target, steps=steps,
                   arguments=arguments_of(settings), seed=seed, device=device, decoded=decoded)  # fmt: skip
    _save_picture(picture, out)
    click.echo(f"picture in {out}")


def _check_picture(out: Path) -> None:
    if out.suffix.lower() not in PICTURES:
        raise DitqError(f"{out}: pictures are written as .png, .jpg or .webp; give it such a name")
    if out.is_dir():
        raise DitqError(f"{out}: is a folder; give the name of a picture")


def _save_picture(picture: Any, out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format=PICTURES[out.suffix.lower()])
        partial.replace(out)
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from error
    finally:
        partial.unlink(missing_ok=True)
