"""Refining a rotation: the matrices of its block steps move along orthogonal matrices, downhill on a given loss.

The steps themselves stay: a learned rotation costs at run time what the one that it started from did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ditq.numerics.rotation import BlockStep, HeadsStep, Rotation

MOMENTUM = 0.9
ROUNDING = 1e-9  # of the gradient's norm: a turn of less is rounding, not descent


def cayley(matrix: Tensor, skew: Tensor) -> Tensor:
    """matrix [..., b, b] orthogonal, skew [..., b, b] = -skew^T -> (I + skew/2)^-1 (I - skew/2) matrix, orthogonal again.

    The Cayley transform, as in Cayley SGD (Li 2020, arXiv 2002.01113) and SpinQuant (arXiv 2405.16406, section 3.2), solved
    exactly instead of by fixed-point iteration: b is at most a few hundred.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(identity + skew / 2, (identity - skew / 2) @ matrix)


def refine(
    rotation: Rotation, loss: Callable[[Rotation], Tensor], steps: int, rate: float = 0.1
) -> tuple[Rotation, float, float]:
    """(the rotation of least loss on the way, the loss before, the least loss).

    loss: a differentiable scalar of the rotation, always on the same rows. Each step turns every matrix M by the skew part
    G M^T - M G^T of its gradient G, averaged with momentum and scaled so that a step turns a channel by about `rate`
    radians at first, by none at the end (cosine).

    Raises:
        ValueError: for a rotation without a matrix to learn, or no steps.
    """
    places = [i for i, step in enumerate(rotation.steps) if isinstance(step, (BlockStep, HeadsStep))]
    if not places or steps < 1:
        raise ValueError("learning needs a rotation with a block step, and at least one step")
    best, first, least = rotation, math.inf, math.inf
    matrices = [rotation.steps[i].matrix.double() for i in places]  # type: ignore[union-attr]
    averages = [torch.zeros_like(matrix) for matrix in matrices]
    for number in range(steps + 1):
        leaves = [matrix.detach().clone().requires_grad_() for matrix in matrices]
        with torch.enable_grad():
            value = loss(_with(rotation, places, leaves))
            gradients = torch.autograd.grad(value, leaves)
        found = float(value.detach())
        if number == 0:
            first = found
        if found < least:
            least, best = found, rotation if number == 0 else _with(rotation, places, matrices)
        if number == steps:
            break
        size = rate * (1 + math.cos(math.pi * number / steps)) / 2
        for i, (matrix, gradient) in enumerate(zip(matrices, gradients, strict=True)):
            product = gradient @ matrix.mT
            averages[i] = MOMENTUM * averages[i] + (1 - MOMENTUM) * (product - product.mT)
            turned = averages[i].square().sum(dim=-1).mean().sqrt()  # radians a channel, over all
            if float(turned) > ROUNDING * float(gradient.norm()):
                matrices[i] = cayley(matrix, size * averages[i] / turned)
    return best, first, least


def _with(rotation: Rotation, places: list[int], matrices: list[Tensor]) -> Rotation:
    steps = list(rotation.steps)
    for place, matrix in zip(places, matrices, strict=True):
        steps[place] = replace(steps[place], matrix=matrix)  # type: ignore[arg-type]
    return Rotation(rotation.size, tuple(steps))
