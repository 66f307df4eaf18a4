"""The losses of distillation: answers and features against the original's (Dense2MoE, arXiv 2510.09094), and parts alone.

    L = L_out + feature sum_l w_l ||f_T^l - f_S^l||^2 + balance L_bal
    w_l = (|L_out| / |L_l|) (mean_l' ||f_T^l'|| / ||f_T^l||)     without gradient

f^l is the output of block l. A factor w_l makes each block's loss as large as that of the answers, smaller for blocks whose
output is large; only its direction is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditq.passes.guided_error import squared
from ditq.passes.watched import Seen

LEAST = 1e-6  # relative error of a feature below which its weight grows no further: rounding has no direction to follow


def answer_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], energy: float, guidance: Tensor | None, latents: Tensor | None
) -> Tensor:
    """Squared error of the answers [B, ...] a sample, of branches as guidance joins them and a little of each alone.

    energy: the same of the original's answers, a sample, so that 1 is an error as large as the answer.
    """
    difference = [a.float() - b.float() for a, b in zip(student, teacher, strict=True)]
    weights = difference[0].new_ones(len(difference[0]))
    return squared(difference, weights, guidance, latents) / (energy * len(weights))


def feature_losses(student: Sequence[Sequence[Tensor]], teacher: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """(relative squared error of each block's output [L], the norm ||f_T|| of it [L])."""
    lost, norms = [], []
    for made, wanted in zip(student, teacher, strict=True):
        pairs = [(a.float(), b.float()) for a, b in zip(made, wanted, strict=True)]
        energy = torch.stack([b.square().sum() for _, b in pairs]).sum().clamp_min(1e-30)
        lost.append(torch.stack([(a - b).square().sum() for a, b in pairs]).sum() / energy)
        norms.append(energy.sqrt())
    return torch.stack(lost), torch.stack(norms)


def weighted_features(output: Tensor, lost: Tensor, norms: Tensor) -> Tensor:
    """sum_l w_l L_l from the loss of the answers, the relative losses [L] of the features and their norms [L]."""
    weights = (output / lost.clamp_min(LEAST) * norms.mean() / norms).detach()
    return (weights * lost).sum()


def distillation_losses(
    student: Seen,
    teacher: Seen,
    energy: float,
    guidance: Tensor | None,
    latents: Tensor | None,
    feature: float,
    balance: float,
) -> dict[str, Tensor]:
    """`total`, and what it is made of: `output`, `features` (their mean relative error) and `balance`."""
    output = answer_loss(student[0], teacher[0], energy, guidance, latents)
    total, features = output + balance * student[2], output.new_zeros(())
    if feature:
        lost, norms = feature_losses(student[1], teacher[1])
        total, features = total + feature * weighted_features(output, lost, norms), lost.mean()
    return {"total": total, "output": output, "features": features, "balance": student[2]}


def regression_losses(
    student: Sequence[Sequence[Tensor]], teacher: Sequence[Sequence[Tensor]], distances: Sequence[str]
) -> dict[str, Tensor]:
    """Each unit's distance to what the original gave for the same input, relative to that: `total` is their sum.

    distances: `l2`, squared, or `l1`, for each of them.
    """
    found = []
    for made, wanted, distance in zip(student, teacher, distances, strict=True):
        power = 2 if distance == "l2" else 1
        pairs = [(a.float(), b.float()) for a, b in zip(made, wanted, strict=True)]
        lost = torch.stack([(a - b).abs().pow(power).sum() for a, b in pairs]).sum()
        size = torch.stack([b.abs().pow(power).sum() for _, b in pairs]).sum()
        found.append(lost / size.clamp_min(1e-30))
    total = torch.stack(found).sum()
    return {"total": total, "parts alone": total / len(found)}
