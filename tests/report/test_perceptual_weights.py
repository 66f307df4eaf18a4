"""ST-LPIPS with the weights of the optional package `stlpips-pytorch`."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ditq.report import perceptual


@pytest.fixture(scope="module")
def base() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:64] / 63
    picture = np.stack([x, y, (x + y) / 2], axis=-1)
    picture[20:40, 20:40] = [0.9, 0.2, 0.1]
    return picture


def distance(a: np.ndarray, b: np.ndarray) -> float:
    value = perceptual.st_lpips(a, b)
    assert value is not None
    return value


def test_the_same_picture_is_at_distance_zero(base: np.ndarray) -> None:
    assert distance(base, base) == 0.0
    assert perceptual.PACKAGE not in sys.modules


def test_distances_are_those_of_the_package_itself(base: np.ndarray) -> None:
    """Values that stlpips-pytorch 0.0.2 itself gave (LPIPS(net="alex", variant="shift_tolerant")) on these pictures."""
    generator = np.random.default_rng(0)
    generator.standard_normal(base.shape)
    for noise, expected in ((0.05, 0.08857317268848419), (0.2, 0.6087964773178101)):
        noisy = np.clip(base + noise * generator.standard_normal(base.shape), 0, 1)
        # five layers of float32 sums over up to 3456 products: far within 1e-4, also in another order of summation
        assert distance(base, noisy) == pytest.approx(expected, rel=1e-4)
    assert distance(base, np.roll(base, 1, axis=1)) == pytest.approx(0.01092531532049179, rel=1e-4)


def test_more_noise_is_further_away_and_a_shift_by_one_pixel_near(base: np.ndarray) -> None:
    generator = np.random.default_rng(1)
    noise = generator.standard_normal(base.shape)
    distances = [distance(base, np.clip(base + level * noise, 0, 1)) for level in (0.01, 0.03, 0.1, 0.3)]
    assert distances == sorted(distances) and distances[0] > 0
    assert distance(base, np.roll(base, 1, axis=1)) < distances[2] / 4


def test_eight_bit_pictures_are_read_as_their_floats(base: np.ndarray) -> None:
    eight = (base * 255).round().astype(np.uint8)
    other = np.roll(eight, 3, axis=0)
    assert distance(eight, other) == distance(eight / 255, other / 255)
