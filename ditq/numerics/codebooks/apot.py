"""Additive powers of two: each magnitude a sum of a few powers of two, so that a product is a few shifts.

Li et al. 2020 (arXiv 1909.13144, eq. 5): dense near zero like pure powers of two, without their gap at the top. One bit is
the sign; the others choose one power of two out of three, or none, for each two bits, and for a last odd bit one or none.
"""

from __future__ import annotations

import itertools

import torch

from ditq.numerics.carrier import INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.codebooks.uniform import fit_uniform
from ditq.numerics.scaled_table import fit_scaled_table
from ditq.numerics.weight_code import Fit, check_weight


def apot_magnitudes(bits: int) -> torch.Tensor:
    """2^(bits-1) sums of powers of two, from 0 on: float64, ascending.

    n = (bits - 1) // 2 terms of two bits, p_i in {0, 2^-i, 2^-(i+n), 2^-(i+2n)}, i = 0 .. n - 1 (eq. 5 with k = 2). A bit
    that is left over adds one power between the second and the third round.
    """
    terms, odd = divmod(bits - 1, 2)
    choices = [[0.0] + [2.0 ** -(i + j * terms + (odd if j == 2 else 0)) for j in range(3)] for i in range(terms)]
    if odd:
        choices.append([0.0, 2.0 ** -(2 * terms)])
    return torch.tensor([sum(parts) for parts in itertools.product(*choices)], dtype=torch.float64).sort().values


def apot_table(bits: int, carrier: Carrier = INT8) -> torch.Tensor:
    """Both signs, -0 and +0 among them, on the carrier's grid: [2^bits], ascending.

    On int8 the levels are whole multiples of a step, in exact proportion; only those of 7 bits are finer than it.
    """
    largest = carrier.largest(bits)
    magnitudes = apot_magnitudes(bits)
    units = magnitudes / magnitudes[magnitudes > 0].min()
    stretch = carrier.stretch(int(units[-1]), bits)
    above = carrier.distinct(units[1:] * stretch if stretch else units[1:] / units[-1] * largest, largest)
    return carrier.stored(torch.cat((-above.flip(0), torch.zeros(2), above)))


@codebook("apot")
def fit_apot(
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
    return fit_scaled_table(weight, bits, apot_table(bits, carrier)[None], importance, group_size, float_group_scales)
