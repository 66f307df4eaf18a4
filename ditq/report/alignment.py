"""Bring an output that a pass has written in another basis back to the original's, so that the two can be compared.

Passes fold scales, shifts and a rotation into the values of an attention, and scales and shifts into the output of a
modulation. The basis is found again from the outputs themselves, so it need not be known; the best fit also takes up some of
the error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEWEST_ROWS = 8  # for a fit of a line


class Alignment(ABC):
    """Sums over pairs of outputs, and the energy ||y - f(y')||^2 that the best map f of its kind leaves."""

    @abstractmethod
    def add(self, reference: Tensor, output: Tensor) -> None:
        """Count one more pair y, y' [rows, C], float64."""

    @abstractmethod
    def left(self) -> float | None:
        """Energy left after the best map; None with too few rows to fit one."""


@dataclass
class LinearBlocks(Alignment):
    """f(y') = y' A + b, A any matrix within blocks of `width` channels: the heads of an attention, scaled, shifted and rotated.

    Least squares; with `width + 1` free values a channel the residual is enlarged by rows / (rows - width - 1). It takes
    up the part of the error that is itself linear in the head's channels: about 2 dB where a head is a third of the width,
    0.2 dB where it is one of 24.
    """

    width: int
    rows: int = 0
    energy: float = 0.0  # ||Y||^2
    gram: Tensor | None = None  # [Y', 1]^T [Y', 1] by block [C / width, width + 1, width + 1]
    cross: Tensor | None = None  # [Y', 1]^T Y by block [C / width, width + 1, width]

    def add(self, reference: Tensor, output: Tensor) -> None:
        self.rows += reference.shape[0]
        self.energy += float(reference.square().sum())
        a, b = (y.view(y.shape[0], -1, self.width).transpose(0, 1) for y in (reference, output))
        b = torch.cat((b, torch.ones_like(b[..., :1])), dim=-1)
        gram, cross = b.mT @ b, b.mT @ a
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross

    def left(self) -> float | None:
        free = self.width + 1
        if self.gram is None or self.cross is None or self.rows < 2 * free:
            return None
        size = (
            self.gram.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
        )  # channels may differ by orders of magnitude
        even = size[:, :, None] * self.gram * size[:, None, :]
        explained = (torch.linalg.pinv(even, hermitian=True, rtol=1e-12) @ (size[:, :, None] * self.cross)).mul(
            size[:, :, None] * self.cross
        )
        return max(self.energy - float(explained.sum()), 0.0) * self.rows / (self.rows - free)


@dataclass
class ScaledChannels(Alignment):
    """f(y') = a y' + b for each channel by itself: a modulation into which scales and shifts were folded.

    Least squares; with two free values a channel the residual is enlarged by rows / (rows - 2). On the modulations of
    the built-in checkpoint in 4 bits it reads about 1 dB better than the plain comparison does where nothing is folded.
    """

    rows: int = 0
    sums: Any = None  # of y, y', y^2, y'^2, y y' [5, C]

    def add(self, reference: Tensor, output: Tensor) -> None:
        self.rows += reference.shape[0]
        products = (reference, output, reference.square(), output.square(), reference * output)
        sums = torch.stack([product.sum(dim=0) for product in products])
        self.sums = sums if self.sums is None else self.sums + sums

    def left(self) -> float | None:
        if self.rows < FEWEST_ROWS:
            return None
        mean_a, mean_b, square_a, square_b, product = self.sums / self.rows
        variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
        covariance = product - mean_a * mean_b
        explained = torch.where(variance_b > 0, covariance**2 / variance_b.clamp_min(1e-300), 0.0)
        return float((variance_a - explained).clamp_min(0).sum()) * self.rows**2 / (self.rows - 2)
