"""What an error of the denoiser's answers counts: that of the branches as guidance joins them, u + g (c - u)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditq.calibration.batches import CallBatch
from ditq.calibration.sampler import Sampler, without_variance

ALONE = (
    0.25  # what an answer's own error counts beside that of the guided answer where it is learned from: few steps say
)
# much of their difference


def guidance_of(batch: CallBatch, sampler: Sampler | None) -> Tensor | None:
    """What guidance makes of the branches of each step in the batch, [S, B / S]; None where answers count alone."""
    if sampler is None or sampler.branches == 1 or batch.branches != sampler.branches:
        return None
    return sampler.guidance()[batch.steps[:: batch.branches]]


def told(sampler: Sampler | None) -> str:
    """For the report: what errors of the branches counted as."""
    if sampler is None:
        return "not known, each alone: the sampler's steps are not linear in the answers"
    return ", ".join(f"{weight:.3g}" for weight in sampler.guidance()[0].tolist())


def squared(
    tensors: Sequence[Tensor],
    weights: Tensor,
    guidance: Tensor | None = None,
    latents: Tensor | None = None,
    alone: float = ALONE,
) -> Tensor:
    """sum_b w_b ||values_b||^2 over the tensors [B, ...]; with guidance, of the branches as it joins them, and `alone` times
    that of each.

    A tensor that is not by sample counts with the mean weight. `weights` [B]; `guidance` [S, B / S], with the `latents` of the
    call, which tell a learned variance from the answer.
    """
    total = weights.new_zeros(())
    for values in tensors:
        if values.shape[0] != len(weights):
            total = total + values.float().square().sum() * weights.mean()
            continue
        rows, share = values.float().flatten(1), 1.0
        if guidance is not None:
            if latents is not None:
                rows = without_variance(values, latents).float().flatten(1)
            share = alone
            branches = rows.unflatten(0, guidance.shape)
            joined = torch.einsum("sbe,sb->se", branches, guidance)
            total = total + joined.square().sum(1) @ weights[:: branches.shape[1]]
        total = total + share * (rows.square().sum(1) @ weights)
    return total
