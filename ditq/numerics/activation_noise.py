"""Weights for inputs that are themselves rounded at run time.

The layer gets x_q = x + e. For an error e that is independent of x and between channels, with N = diag(E[e^2]), the
squared error of the output is

    E|x W^T - x_q Q^T|^2 = tr((W - Q) H (W - Q)^T) + tr(Q N Q^T) = tr((W* - Q)(H + N)(W* - Q)^T) + what no Q changes,
    W* = W H (H + N)^-1

so the best Q rounds W*, not W, under H + N: weights of directions in which the input is weaker than its noise shrink, as
in a Wiener filter. (Calibration on the inputs that the layer really gets: GPTAQ, Li 2025, arXiv 2504.02692; here from
the format alone, and only for the layer's own rounding.)

How weak the weak directions are is what a small calibration set tells least: in those that its prompts do not reach, W*
would throw away weights that other prompts need. So W* is found with H + d I, d a share of the mean diagonal.
"""

from __future__ import annotations

import torch

from ditq.numerics.activation_format import ActivationFormat

TARGET_DAMPING = 0.1  # d; tools/measure_rounding.py judges it on other prompts


def rounding_noise(sample: torch.Tensor, form: ActivationFormat, scale: torch.Tensor | None = None) -> torch.Tensor:
    """E[(x_q - x)^2] of every channel of the rows [N, C]: float64 [C]. scale: the calibrated one, if any, or [N, 1]."""
    return (form.rounded(sample, scale) - sample).double().square().mean(0)


def for_noisy_inputs(
    weight: torch.Tensor, hessian: torch.Tensor, noise: torch.Tensor, damping: float = TARGET_DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [O, I], hessian [I, I] = E[x^T x], noise [I] -> W* (weight's dtype) and H + N (hessian's dtype).

    damping: d, as a share of H's mean diagonal; 0 for the least squares of the calibration itself.

    Raises:
        ValueError: for a Hessian that is not positive semidefinite, or not finite.
    """
    noisy = hessian.double() + torch.diag(noise.double())
    # a channel without signal or noise: its weights matter to nothing and stay as they are
    solvable = noisy + torch.diag((noisy.diagonal() <= 0).double())
    solvable.diagonal().add_(max(damping, 1e-9) * hessian.double().diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(solvable)
    if int(failed) or not bool(noisy.isfinite().all()):
        raise ValueError("the Hessian of noisy inputs is not finite and positive semidefinite")
    # W (H + d)(H + d + N)^-1 = W - W N (H + d + N)^-1
    lost = torch.cholesky_solve((weight.double() * noise.double()).T, factor).T
    return (weight.double() - lost).to(weight.dtype), noisy.to(hessian.dtype)
