"""Low-rank branch (SVDQuant, Li 2024, arXiv 2411.05007): W ~ Q + B A, few bits for Q and two thin factors beside it.

What the factors take out, the codes need not cover: the remainder W - B A is smaller, so its steps are finer. With
E = W - Q, H = X^T X and U the leading eigenvectors of E H E^T, the best factors of rank r for the output are

    B A = U U^T E        min |(E - B A) H^(1/2)|^2 = tr(E H E^T) - the r largest eigenvalues

the truncated SVD of E H^(1/2) with no square root or inverse of H. They are found and kept in 8 bits before the
remainder is coded, so that their own rounding is one more thing that the codes make up for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ditq.numerics.weight_code import WeightCode

ITERATIONS = 5  # of remainder and factors in turn
LEAST_GAIN = 0.01  # of the error: less, and the turns are over
LARGEST_DOWN = 64  # as of carriers of few bits: integer products stay exact in 16 bits (carrier.INT8.largest)
LARGEST_UP = 127
_EXACT_UP_TO = 1024  # rows: beyond, leading eigenvectors come from subspace iteration
_OVERSAMPLED, _SUBSPACE_STEPS = 8, 12


@dataclass(frozen=True, eq=False)
class LowRank:
    """B A = up diag(scale) down. down: int8 [r, I] within +-64; up: int8 [O, r]; scale: float32 [r]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: torch.Tensor

    @property
    def rank(self) -> int:
        """r: how many rows A has."""
        return self.scale.shape[0]

    def to(self, device: torch.device) -> LowRank:
        """The same there."""
        return LowRank(self.down.to(device), self.up.to(device), self.scale.to(device))

    def product(self) -> torch.Tensor:
        """B A, float32 [O, I]."""
        return self.up.float() @ (self.down * self.scale[:, None])


def _leading(remainder: torch.Tensor, hessian: torch.Tensor | None, rank: int) -> torch.Tensor:
    """Orthonormal leading eigenvectors [O, r] of E H E^T, float64; H None is the identity."""
    weighted = remainder if hessian is None else remainder @ hessian
    rows = len(remainder)
    if rows <= _EXACT_UP_TO:
        return torch.linalg.eigh(weighted @ remainder.T)[1][:, -rank:].flip(1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, min(rank + _OVERSAMPLED, rows), generator=generator, dtype=remainder.dtype)
    basis = start.to(remainder.device)
    for _ in range(_SUBSPACE_STEPS):
        basis = torch.linalg.qr(weighted @ (remainder.T @ basis))[0]
    small = basis.T @ (weighted @ (remainder.T @ basis))
    return basis @ torch.linalg.eigh((small + small.T) / 2)[1][:, -rank:].flip(1)


def fit_low_rank(remainder: torch.Tensor, hessian: torch.Tensor | None, rank: int) -> LowRank:
    """The factors of least output error of `remainder` [O, I], rounded to 8 bits.

    hessian [I, I] = X^T X, any scale; None weighs all inputs alike (the truncated SVD of the weight).

    Raises:
        ValueError: for a rank outside 1 .. min(O, I), or shapes that do not fit.
    """
    rows, columns = remainder.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"a weight {[rows, columns]} has no branch of rank {rank}; 1 to {min(rows, columns)}")
    if hessian is not None and hessian.shape != (columns, columns):
        raise ValueError(f"a Hessian {list(hessian.shape)} is not of a weight {[rows, columns]}")
    wide = remainder.double()
    up = _leading(wide, None if hessian is None else hessian.double(), rank)
    down = up.T @ wide
    smallest = torch.finfo(torch.float32).tiny
    up_scale = (up.abs().amax(0) / LARGEST_UP).clamp_min(smallest)
    down_scale = (down.abs().amax(1) / LARGEST_DOWN).clamp_min(smallest)
    return LowRank(
        (down / down_scale[:, None]).round().to(torch.int8).contiguous(),
        (up / up_scale).round().to(torch.int8).contiguous(),
        (up_scale * down_scale).float(),
    )


def code_with_branch(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    rank: int,
    code: Callable[[torch.Tensor], WeightCode],
    error: Callable[[torch.Tensor], float],
) -> WeightCode:
    """weight [O, I] as codes of a remainder and a low-rank branch; of all turns, the one of least error.

    code: a weight -> its code, by the codebook and rounding of the recipe. error: an approximation [O, I] -> its error.

    The first factors are those of the weight itself with all inputs alike: what the codes lose grows with the size of
    the remainder, not with what it does to the output. Later ones take up what the codes lost, as the output sees it.
    """
    best: WeightCode | None = None
    least = previous = torch.inf
    approximation = torch.zeros_like(weight)
    for turn in range(ITERATIONS):
        branch = fit_low_rank(weight - approximation, hessian if turn else None, rank)
        coded = code(weight - branch.product())
        approximation = coded.decode()
        found = error(approximation + branch.product())
        if best is None or found < least:
            best, least = replace(coded, low_rank=branch), found
        if not found < previous * (1 - LEAST_GAIN):
            break
        previous = found
    assert best is not None
    return best
