"""Metrics against values worked out by hand and against independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from ditq.report import metrics


def test_psnr_is_what_the_definition_gives_by_hand() -> None:
    dark = np.full((8, 8, 3), 0.3)
    assert metrics.psnr(dark, dark + 0.1) == pytest.approx(20.0)  # 10 log10(1 / 0.01)
    assert metrics.psnr(dark, dark + 0.1, peak=2.0) == pytest.approx(20.0 + 20 * math.log10(2))
    one_level = np.full((8, 8, 3), 100, np.uint8)
    assert metrics.psnr(one_level, one_level + np.uint8(1)) == pytest.approx(20 * math.log10(255))
    # uint8 differences do not wrap round
    assert metrics.psnr(np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)) == pytest.approx(0.0)


def test_psnr_averages_the_error_over_all_channels_together() -> None:
    a = np.zeros((4, 4, 3))
    b = a.copy()
    b[..., 0] = 0.3  # MSE = 0.09 / 3
    assert metrics.psnr(a, b) == pytest.approx(-10 * math.log10(0.03))


def test_identical_pictures_have_infinite_psnr_and_ssim_one() -> None:
    picture = np.random.default_rng(0).random((16, 16, 3))
    assert metrics.psnr(picture, picture) == math.inf
    assert metrics.ssim(picture, picture) == pytest.approx(1.0, abs=1e-12)


def dense_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang 2004, written again with one dense 11x11 window and scipy's convolution."""
    grid = np.mgrid[-5:6, -5:6]
    window = np.exp(-(grid**2).sum(axis=0) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(a.shape[2]):
        x, y = a[..., channel], b[..., channel]
        mx, my, xx, yy, xy = (convolve2d(p, window, mode="valid") for p in (x, y, x * x, y * y, x * y))
        vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
        c1, c2 = 0.01**2, 0.03**2
        values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(values))


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_ssim_agrees_with_a_dense_implementation(noise: float) -> None:
    generator = np.random.default_rng(1)
    a = generator.random((23, 31, 3))
    b = np.clip(a + noise * generator.standard_normal(a.shape), 0, 1)
    assert metrics.ssim(a, b) == pytest.approx(dense_ssim(a, b), abs=1e-12)
    a8, b8 = (a * 255).astype(np.uint8), (b * 255).astype(np.uint8)
    assert metrics.ssim(a8, b8) == pytest.approx(dense_ssim(a8 / 255, b8 / 255), abs=1e-12)


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    a, b = np.full((12, 12, 3), 0.2), np.full((12, 12, 3), 0.4)
    assert metrics.ssim(a, b) == pytest.approx((2 * 0.08 + 1e-4) / (0.04 + 0.16 + 1e-4))


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(np.zeros((10, 20, 3)), np.zeros((10, 20, 3)))
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.psnr(np.zeros((10, 20, 3)), np.zeros((20, 10, 3)))


def test_relative_error_sqnr_and_cosine_by_hand() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
    assert metrics.relative_error(a, b) == pytest.approx(1 / 25)
    assert metrics.sqnr_db(a, b) == pytest.approx(10 * math.log10(25))
    assert metrics.cosine(a, b) == pytest.approx(29 / (5 * math.sqrt(34)))
    assert metrics.cosine(a, torch.tensor([-4.0, 3.0])) == pytest.approx(0.0)


def test_zero_tensors_have_defined_errors() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert metrics.relative_error(zero, zero) == 0 and metrics.sqnr_db(zero, zero) == math.inf
    assert metrics.relative_error(zero, one) == math.inf and metrics.sqnr_db(zero, one) == -math.inf
    assert metrics.cosine(zero, zero) == 1.0 and metrics.cosine(zero, one) == 0.0


def test_bfloat16_errors_are_summed_in_float64() -> None:
    a = torch.full((100_000,), 1.0, dtype=torch.bfloat16)
    assert metrics.relative_error(a, a * 0.5) == 0.25


def test_plainly_wrong_pictures_are_named() -> None:
    assert metrics.defect(np.zeros((4, 4, 3), np.uint8)) == "is one colour everywhere (0, 0, 0)"
    assert metrics.defect(np.array([[[0.1, 0.2, np.nan]]])) == "has values that are not finite"
    fine = np.zeros((4, 4, 3), np.uint8)
    fine[1, 2, 0] = 1
    assert metrics.defect(fine) is None
