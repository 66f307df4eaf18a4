"""Weights that the codebook tests share, and errors of them taken element by element."""

from __future__ import annotations

import torch

from ditq.numerics.codebook import Fit, encode


def gaussian(rows: int = 256, columns: int = 1152, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int = 64, columns: int = 768) -> torch.Tensor:
    """Student's t with 4 degrees of freedom, each row on a scale of its own and off centre."""
    g = torch.Generator().manual_seed(2)
    normal = torch.randn(rows, columns, 5, generator=g)
    t = normal[..., 0] / normal[..., 1:].square().mean(-1).sqrt()
    return (t + 0.3) * torch.logspace(-3, 0, rows)[:, None]


def relative_error(weight: torch.Tensor, fit: Fit) -> float:
    return float((weight - encode(weight, fit).decode()).square().sum() / weight.square().sum())


def nearest_error(values: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Element by element in float64: squared distances of the values [N] to the nearest of the levels [L], summed."""
    distance = (values.double()[:, None] - levels.double()).abs().amin(dim=1).square()
    return (distance if importance is None else distance * importance.double()).sum()


def student_t(rows: int = 256, columns: int = 1152) -> torch.Tensor:
    """Student's t with 5 degrees of freedom."""
    normal = torch.randn(rows, columns, 6, generator=torch.Generator().manual_seed(0))
    return normal[..., 0] / normal[..., 1:].square().mean(-1).sqrt()


def skewed(rows: int = 64, columns: int = 768) -> torch.Tensor:
    """Many small positive values, few large negative ones."""
    g = torch.Generator().manual_seed(4)
    return torch.randn(rows, columns, generator=g).abs() ** 1.5 * torch.where(
        torch.rand(rows, columns, generator=g) < 0.3, -0.5, 1.0
    )
