"""The directions in which a linear's output really varies, from its weight and the covariance of its input."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_outputs(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(U [O, n], energies [n], falling): orthonormal directions of y = W x, and the variance of y along each.

    Weight [O, I], covariance [I, I] of x, n = min(O, I). With C = L L^T, U holds the left singular vectors of W L and the
    energies are its singular values squared; W' = U_r U_r^T W is the W' of rank r for which E|(W - W')(x - E x)|^2 is least,
    the sum of the energies left out (Eckart and Young, Psychometrika 1, 1936). All in float64.

    The vectors come from (W L)^T (W L), which is as small as the input; those of no energy are left out.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    shaped = weight.double() @ (vectors * values.clamp_min(0).sqrt())
    energies, right = torch.linalg.eigh(shaped.T @ shaped)
    energies, right = energies.flip(0).clamp_min(0), right.flip(1)
    known = int((energies > 1e-12 * energies[0].clamp_min(1e-300)).sum())
    # Squaring has lost half the digits of small directions: a QR makes what is left of them orthonormal again.
    left, signs = torch.linalg.qr(shaped @ right[:, :known])
    return left * signs.diagonal().sign(), energies[:known]


def rank_for(energies: Tensor, keep: float) -> int:
    """The least number of directions that hold a share `keep` of all energy; 1 at least."""
    shares = energies.cumsum(0) / energies.sum().clamp_min(1e-300)
    return max(1, min(int((shares < keep).sum()) + 1, len(energies)))
