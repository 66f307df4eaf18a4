"""Symmetric uniform codebook whose top level is the row's largest weight: plain round-to-nearest, the usual baseline."""

from __future__ import annotations

import torch

from ditq.numerics.carrier import INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.codebooks.uniform import fit_uniform
from ditq.numerics.weight_code import Fit


@codebook("uniform_absmax")
def fit_uniform_absmax(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    float_group_scales: bool = False,
    carrier: Carrier = INT8,
) -> Fit:
    """As `fit_uniform` without its search: scale = max|w| / (2^(bits-1) - 1). `importance` has nothing to choose here."""
    return fit_uniform(
        weight, bits, None, group_size, clip_search=False, float_group_scales=float_group_scales, carrier=carrier
    )
