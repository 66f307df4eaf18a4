"""Distances between pictures and between tensors, as the report uses them: pure functions of numpy arrays and tensors.

Pictures are [H, W, 3] (or [H, W]) arrays, uint8 or floats in [0, peak]; tensors may have any shape.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Picture = NDArray[np.floating] | NDArray[np.uint8] | ArrayLike

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def as_unit(picture: Picture, peak: float = 1.0) -> NDArray[np.float64]:
    """The picture as float64 in [0, 1]: uint8 is divided by 255, floats by `peak`."""
    array = np.asarray(picture)
    return array.astype(np.float64) / (255.0 if array.dtype == np.uint8 else peak)


def _pair(a: Picture, b: Picture, peak: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = as_unit(a, peak), as_unit(b, peak)
    if first.shape != second.shape:
        raise ValueError(f"pictures of shapes {first.shape} and {second.shape} cannot be compared")
    return first, second


def mean_squared_error(a: Picture, b: Picture, peak: float = 1.0) -> float:
    """Mean over all pixels and channels of the squared difference of the pictures scaled to [0, 1]."""
    first, second = _pair(a, b, peak)
    return float(np.mean((first - second) ** 2))


def psnr_of(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on the [0, 1] scale; infinite for 0."""
    return math.inf if error == 0 else -10.0 * math.log10(error)


def psnr(a: Picture, b: Picture, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(peak^2 / MSE), MSE over all pixels and channels together.

    `a`, `b`: [H, W, 3], uint8 (their peak is 255) or floats with the given `peak`. Identical pictures give infinity.
    Source: Huynh-Thu and Ghanbari, "Scope of validity of PSNR in image/video quality assessment", 2008, eq. 1.
    """
    return psnr_of(mean_squared_error(a, b, peak))


def _gaussian(size: int, sigma: float) -> NDArray[np.float64]:
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    return weights / weights.sum()


def _filter_valid(planes: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """planes [N, H, W] filtered with the separable window, only where the window lies inside the picture."""
    for axis in (1, 2):
        windows = np.lib.stride_tricks.sliding_window_view(planes, len(weights), axis=axis)
        planes = windows @ weights
    return planes


def ssim(a: Picture, b: Picture, peak: float = 1.0) -> float:
    """Structural similarity, mean over the valid region and the colour channels; 1 for identical pictures.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    2004, eq. 13: an 11x11 circular Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, L = the peak. The channels are
    compared one by one and averaged. Pictures under 11 pixels wide or high raise ValueError.
    """
    first, second = _pair(a, b, peak)
    if min(first.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW}x{SSIM_WINDOW}, not {first.shape[:2]}")
    x = np.moveaxis(np.atleast_3d(first), -1, 0)
    y = np.moveaxis(np.atleast_3d(second), -1, 0)
    weights = _gaussian(SSIM_WINDOW, SSIM_SIGMA)
    mean_x, mean_y = _filter_valid(x, weights), _filter_valid(y, weights)
    variance_x = _filter_valid(x * x, weights) - mean_x**2
    variance_y = _filter_valid(y * y, weights) - mean_y**2
    covariance = _filter_valid(x * y, weights) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(np.mean(numerator / denominator))


def relative_error(reference: Tensor, other: Tensor) -> float:
    """||reference - other||^2 / ||reference||^2 in float64; 0 for two zero tensors, infinite where only one is zero."""
    a, b = reference.detach().to(torch.float64), other.detach().to(torch.float64)
    if a.shape != b.shape:
        raise ValueError(f"tensors of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    return energy_ratio(float((a - b).square().sum()), float(a.square().sum()))


def energy_ratio(error: float, signal: float) -> float:
    """error / signal of two energies, with 0/0 = 0: nothing was lost where nothing was."""
    if signal == 0:
        return 0.0 if error == 0 else math.inf
    return error / signal


def decibels(ratio: float) -> float:
    """-10 log10 of a relative error: a signal-to-noise ratio in dB, infinite for no error."""
    if ratio == 0:
        return math.inf
    return -math.inf if math.isinf(ratio) else -10.0 * math.log10(ratio)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: 10 log10(||reference||^2 / ||reference - other||^2)."""
    return decibels(relative_error(reference, other))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors read as vectors; 1 for two zero tensors, 0 where only one is zero."""
    x, y = a.detach().to(torch.float64).flatten(), b.detach().to(torch.float64).flatten()
    lengths = float(x.norm()) * float(y.norm())
    if lengths == 0:
        return 1.0 if float(x.norm()) == float(y.norm()) else 0.0
    return float(x @ y) / lengths


def defect(picture: Picture) -> str | None:
    """What is plainly wrong with a picture, or None: values that are not finite, or one colour everywhere."""
    array = np.asarray(picture)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "has values that are not finite"
    flat = array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array.reshape(-1, 1)
    if (flat == flat[0]).all():
        return f"is one colour everywhere ({', '.join(f'{value:g}' for value in flat[0])})"
    return None
