"""Choose the captions that come with the small checkpoints: some to calibrate with, others to measure with."""

import random
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.emoji_data import DataError, fetch_packages, load_emoji


def choose(captions: list[str], counts: list[int], seed: int) -> list[list[str]]:
    """Lists of captions that share no emoji's name, their styles in turn."""
    styles_by_name: dict[str, set[str]] = {}
    for caption in captions:
        name, style = caption.rsplit(", ", 1)
        styles_by_name.setdefault(name, set()).add(style)
    styles = sorted(set().union(*styles_by_name.values()))
    names = sorted(name for name, present in styles_by_name.items() if len(present) == len(styles))
    if len(names) < sum(counts):
        raise DataError(f"{sum(counts)} captions are wanted, but only {len(names)} names have every style")
    random.Random(seed).shuffle(names)
    chosen = [f"{name}, {styles[i % len(styles)]}" for i, name in enumerate(names[: sum(counts)])]
    lists: list[list[str]] = []
    for count in counts:
        lists.append(chosen[:count])
        chosen = chosen[count:]
    return lists


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the npm packages.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to.")
@click.option("--calibration", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--heldout", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
def main(data: Path, out: Path, calibration: int, heldout: int, seed: int) -> None:
    """Write captions_calibration.txt and captions_heldout.txt, one caption a line."""
    try:
        fetch_packages(data)
        lists = choose(load_emoji(data).captions, [calibration, heldout], seed)
    except DataError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    for name, captions in zip(("calibration", "heldout"), lists, strict=True):
        (out / f"captions_{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
