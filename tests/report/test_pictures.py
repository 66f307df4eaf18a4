"""Grids, differences and data addresses, pixel by pixel."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from ditq.report.pictures import BACKGROUND, MARGIN, data_address, difference, enlarged, image_grid


def flat(color: tuple[int, int, int], size: tuple[int, int] = (160, 130)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_a_grid_holds_every_picture_in_its_place() -> None:
    colors = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(1, 2, 3), (40, 50, 60), (200, 100, 0)]]
    grid = image_grid([[flat(color) for color in row] for row in colors])
    assert grid.size == (MARGIN + 3 * (160 + MARGIN), MARGIN + 2 * (130 + MARGIN))
    for y, row in enumerate(colors):
        for x, color in enumerate(row):
            left, top = MARGIN + x * (160 + MARGIN), MARGIN + y * (130 + MARGIN)
            assert grid.getpixel((left, top)) == color == grid.getpixel((left + 159, top + 129))
    assert grid.getpixel((0, 0)) == BACKGROUND


def test_labels_are_drawn_above_and_never_over_a_picture() -> None:
    rows = [[flat((255, 0, 0)), flat((255, 0, 0))]] * 2
    grid = np.asarray(image_grid(rows, ["original", "a very long label " * 9], ["a prompt\nin two lines", "Å 漢字"]))
    assert (grid == (255, 0, 0)).all(axis=-1).sum() == 4 * 160 * 130
    assert (grid[: MARGIN + 12].max(axis=-1) < 100).any()  # the labels' ink, above the first picture


def test_a_grid_needs_rows_of_one_length_and_matching_labels() -> None:
    picture = flat((0, 0, 0))
    for rows, labels, row_labels in (
        ([], [], []),
        ([[picture], [picture, picture]], [], []),
        ([[picture]], ["a", "b"], []),
        ([[picture]], [], ["a", "b"]),
    ):
        with pytest.raises(ValueError, match="a grid needs"):
            image_grid(rows, labels, row_labels)


def test_small_pictures_are_enlarged_by_repeating_pixels() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert (np.asarray(enlarged(small)) == np.repeat(np.repeat(np.asarray(small), 2, 0), 2, 1)).all()
    assert enlarged(flat((0, 0, 0))).size == (160, 130)


def test_differences_are_absolute_amplified_and_cut_off() -> None:
    found = difference(flat((10, 100, 200)), flat((15, 90, 100)))
    assert found.getpixel((0, 0)) == (20, 40, 255)


def test_small_pictures_stay_exact_and_large_ones_become_small() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    kind, content = data_address(small).split(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) == np.asarray(small)).all()
    kind, content = data_address(flat((9, 9, 9), (2048, 1024))).split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (320, 160)
