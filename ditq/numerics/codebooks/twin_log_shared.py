"""Shared twin-log codebook: one table for the whole tensor, both signs alike, and one scale a row or a group.

The twin-log levels 2^(k d + l_0) - eta are mu-law companding, F(w) = ln(1 + mu |w|/M) / ln(1 + mu) with mu = M/eta, so
one number says how many levels go to the dense middle: mu -> 0 is uniform, a large mu is pure log2.
"""

from __future__ import annotations

import torch

from ditq.numerics.carrier import INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.codebooks.uniform import fit_uniform
from ditq.numerics.scaled_table import fit_scaled_table
from ditq.numerics.weight_code import Fit, check_weight

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # mu


def mu_law_table(bits: int, mu: float, carrier: Carrier = INT8) -> torch.Tensor:
    """+-L C_k rounded, C_k = ((1 + mu)^(u_k) - 1) / mu, u_k = (k + 1/2) / (n - 1/2), n = 2^(bits-1): [2^bits].

    L is the carrier's `largest`.

    Raises:
        ValueError: for bits outside 2..7 or a strength that is not positive.
    """
    if not 2 <= bits <= 7 or not mu > 0:
        raise ValueError(f"a mu-law table has 2 to 7 bits and a positive mu, not {bits} and {mu}")
    count = 1 << (bits - 1)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / (count - 0.5)
    largest = carrier.largest(bits)
    positive = carrier.distinct(largest * ((1 + mu) ** u - 1) / mu, largest)
    return carrier.stored(torch.cat((-positive.flip(0), positive)))


@codebook("twin_log_shared")
def fit_twin_log_shared(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    mu: float | None = None,
    float_group_scales: bool = False,
    carrier: Carrier = INT8,
) -> Fit:
    """One table [2^bits] for the tensor: mu of least error out of 0.25 .. 32, or the one given; scales by search.

    weight [O, I]; importance [I]: weight of each column's squared error, e.g. the diagonal of X^T X.
    The scale of a row (or of each run of `group_size` columns) is max|w| * (0.2 .. 1) / L of least squared error.
    Groups are uint8 multipliers of the row's scale, or scales of their own with `float_group_scales`.
    At 8 bits the carrier's own numbers are the levels, so the fit is the uniform one.

    Raises:
        ValueError: for a weight that is not finite [O, I], bits outside 2..8, groups that do not divide I, or mu <= 0.
    """
    check_weight(weight, bits, group_size)
    if bits == 8:
        return fit_uniform(weight, bits, importance, group_size, float_group_scales=float_group_scales, carrier=carrier)
    tables = torch.stack([mu_law_table(bits, m, carrier) for m in (STRENGTHS if mu is None else (mu,))])
    return fit_scaled_table(weight, bits, tables, importance, group_size, float_group_scales)
