"""NormalFloat codebook: levels at the quantiles of a normal distribution, so that every code is used about as often.

NF4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3) as bitsandbytes has it, and what FLUTE (arXiv 2407.10960)
makes of it for other bits. They scale by the largest weight; here the scale is searched.
"""

from __future__ import annotations

import torch

from ditq.numerics.carrier import INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.codebooks.uniform import fit_uniform
from ditq.numerics.scaled_table import fit_scaled_table
from ditq.numerics.weight_code import Fit, check_weight

_TAIL = (1 / 32 + 1 / 30) / 2  # what lies beyond the outermost levels: NF4's own, kept for all bits as in FLUTE


def normal_levels(bits: int) -> torch.Tensor:
    """2^b levels in [-1, 1], float64 ascending: 0, 2^(b-1) above it and 2^(b-1) - 1 below.

    Phi^-1 of evenly spaced probabilities from d to 1/2, and from 1/2 to 1 - d, over the largest; d = (1/32 + 1/30) / 2.
    """
    half = 1 << (bits - 1)
    below = torch.special.ndtri(torch.linspace(_TAIL, 0.5, half, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - _TAIL, half + 1, dtype=torch.float64))
    return torch.cat((below[:-1], above)) / above[-1]


def normal_table(bits: int, carrier: Carrier = INT8) -> torch.Tensor:
    """The levels on the carrier's grid, the outermost at its `largest`: [2^bits]."""
    largest = carrier.largest(bits)
    levels = normal_levels(bits) * largest
    below, above = carrier.distinct(-levels[levels < 0].flip(0), largest), carrier.distinct(levels[levels > 0], largest)
    return carrier.stored(torch.cat((-below.flip(0), torch.zeros(1), above)))


@codebook("nf")
def fit_nf(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    float_group_scales: bool = False,
    carrier: Carrier = INT8,
) -> Fit:
    """One table [2^bits] for every weight, the scale of least squared error for each row or group of columns.

    weight [O, I]; importance [I]: weight of each column's squared error, e.g. the diagonal of X^T X.
    At 8 bits the carrier's own numbers are the levels, so the fit is the uniform one.

    Raises:
        ValueError: for a weight that is not finite [O, I], bits outside 2..8, or groups that do not divide I.
    """
    check_weight(weight, bits, group_size)
    if bits == 8:
        return fit_uniform(weight, bits, importance, group_size, float_group_scales=float_group_scales, carrier=carrier)
    return fit_scaled_table(weight, bits, normal_table(bits, carrier)[None], importance, group_size, float_group_scales)
