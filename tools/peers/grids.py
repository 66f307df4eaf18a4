"""Uniform weight grids as the peers use them: symmetric or asymmetric, a row or a group of columns, clipped or not.

They are `Fit`s of ditq, so that ditq's nearest rounding and GPTQ take them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditq.numerics.rounding import round_gptq
from ditq.numerics.weight_code import Fit, encode

SCALE_BITS = 16  # peers store scales in half precision; they are rounded to it here


@dataclass(frozen=True, eq=False)
class UniformGrid(Fit):
    """Levels (q - zero) * scale, q = 0 .. 2^bits - 1; scale and zero float32 [O, G]."""

    zero: Tensor = torch.empty(0)
    symmetric: bool = True

    def levels(self, rows: slice = slice(None), groups: slice = slice(None)) -> Tensor:
        q = torch.arange(1 << self.bits, dtype=torch.float32)
        return (q - self.zero[rows, groups, None]) * self.scale[rows, groups, None]

    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points for the whole weight."""
        groups = self.scale.numel()
        zeros = 0 if self.symmetric else groups * self.bits
        return groups * (self.group_size or 0) * self.bits + groups * SCALE_BITS + zeros


def uniform_grid(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    clip: float = 1.0,
    norm: float | None = None,
) -> UniformGrid:
    """weight [O, I] -> its grid: max|w| / (2^(b-1) - 1) a step, or (max - min) / (2^b - 1) with a zero point.

    clip: the range is this share of it. norm: search the share 1, 0.99, ..., 0.2 of least sum |w - w^|^norm instead
    (the search of the GPTQ repository, which others have taken over, with norm 2.4).
    """
    size = group_size or weight.shape[1]
    values = weight.float().reshape(-1, size)
    low, high = values.amin(1).clamp_max(0), values.amax(1).clamp_min(0)
    shares = [clip] if norm is None else [1 - step / 100 for step in range(81)]
    best_scale = best_zero = torch.zeros_like(low)
    best = torch.full_like(low, torch.inf)
    for share in shares:
        scale, zero = _grid(low * share, high * share, bits, symmetric)
        q = ((values / scale[:, None]).round() + zero[:, None]).clamp(0, (1 << bits) - 1)
        error = ((q - zero[:, None]) * scale[:, None] - values).abs().pow(norm or 2.0).sum(1)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    shape = (weight.shape[0], -1)
    table = torch.zeros(1 << bits, dtype=torch.int8)  # levels() does not use it
    return UniformGrid(table, best_scale.view(shape), None, bits, size, best_zero.view(shape), symmetric)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        half = 1 << (bits - 1)
        scale = torch.maximum(-low, high) / (half - 1)
        zero = torch.full_like(scale, half)
    else:
        scale = (high - low) / ((1 << bits) - 1)
        zero = (-low / scale.clamp_min(1e-12)).round()
    return scale.clamp_min(1e-7).half().float().clamp_min(1e-7), zero


def nearest(weight: Tensor, grid: UniformGrid) -> Tensor:
    """The weight rounded to the nearest levels, float32 [O, I]."""
    return _decode(encode(weight, grid).codes, grid)


def gptq(weight: Tensor, hessian: Tensor, grid: UniformGrid, damping: float = 0.01) -> Tensor:
    """The weight rounded by GPTQ to the grid's levels, float32 [O, I]."""
    return _decode(round_gptq(weight, hessian, grid, damping=damping).codes, grid)


def _decode(codes: Tensor, grid: UniformGrid) -> Tensor:
    q = codes.float().unflatten(1, (grid.groups, -1))
    return ((q - grid.zero[:, :, None]) * grid.scale[:, :, None]).flatten(1)
