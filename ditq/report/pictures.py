"""Pictures of the report: labelled grids, amplified differences, and data addresses that keep the page in one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
SMALLEST = 128  # pixels: smaller pictures are enlarged by a whole factor, without smoothing
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)


def difference(a: Image.Image, b: Image.Image, gain: float = 4.0) -> Image.Image:
    """|a - b| * gain for each channel, cut off at white."""
    first, second = (np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in (a, b))
    return Image.fromarray(np.clip(np.abs(first - second) * gain, 0, 255).astype(np.uint8))


def enlarged(picture: Image.Image, smallest: int = SMALLEST) -> Image.Image:
    """The picture with each pixel repeated so that its longer side has at least `smallest` pixels."""
    factor = -(-smallest // max(picture.size))
    return (
        picture
        if factor <= 1
        else picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    )


def image_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = (), row_labels: Sequence[str] = ()
) -> Image.Image:
    """One picture of all pictures: `labels` above the columns, `row_labels` above each row, cut where they do not fit.

    All pictures are drawn at the size of the first (small ones enlarged without smoothing). Raises ValueError for rows
    of different lengths, or labels that do not fit their number.
    """
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("a grid needs rows of one and the same length")
    if (labels and len(labels) != len(rows[0])) or (row_labels and len(row_labels) != len(rows)):
        raise ValueError("a grid needs one label for each column and one for each row")
    width, height = enlarged(rows[0][0]).size
    font = ImageFont.load_default(size=max(12, min(width // 12, 22)))
    line = round(font.size * 1.5)  # type: ignore[union-attr]  # a FreeType font has a size
    head = line if labels else 0
    pitch = height + MARGIN + (line if row_labels else 0)
    sheet = Image.new("RGB", (MARGIN + len(rows[0]) * (width + MARGIN), MARGIN + head + len(rows) * pitch), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        pen.text((MARGIN + column * (width + MARGIN), MARGIN // 2), _fitted(pen, label, width, font), INK, font)
    for number, row in enumerate(rows):
        top = MARGIN + head + number * pitch
        if row_labels:
            pen.text((MARGIN, top), _fitted(pen, row_labels[number], sheet.width - 2 * MARGIN, font), INK, font)
            top += line
        for column, picture in enumerate(row):
            shown = enlarged(picture.convert("RGB"))
            if shown.size != (width, height):
                shown = shown.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(shown, (MARGIN + column * (width + MARGIN), top))
    return sheet


def _fitted(pen: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    text = " ".join(text.split())
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


def data_address(picture: Image.Image, longest: int = 320) -> str:
    """The picture as a data: address, at most `longest` pixels wide or high; PNG when small, otherwise JPEG."""
    shown = picture.convert("RGB")
    if max(shown.size) > longest:
        shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind, settings = ("PNG", {"optimize": True}) if max(shown.size) <= SMALLEST else ("JPEG", {"quality": 88})
    buffer = io.BytesIO()
    shown.save(buffer, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
