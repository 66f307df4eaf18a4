"""E2M1 codebook: the sixteen codes of 4-bit floating point (FP4), two bits of exponent and one of mantissa.

The format of the OCP Microscaling specification (v1.0, section 5.3.3). It has groups of 32 with scales that are powers of
two there (MXFP4), and groups of 16 with float8 scales in NVFP4. On carriers of other numbers the scale of a row or a group is
a searched number; FP4 numbers themselves stand in NVFP4's blocks (numerics/block_scales.py).
"""

from __future__ import annotations

import torch

from ditq.numerics.block_scales import fit_blocks
from ditq.numerics.carrier import FLOAT4, INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.scaled_table import fit_scaled_table
from ditq.numerics.weight_code import Fit, check_weight

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1_table(carrier: Carrier = INT8) -> torch.Tensor:
    """-6 .. 6 in equal proportion on the carrier's grid, with -0 and +0 as in the format: [16], ascending."""
    halves = 2 * torch.tensor(MAGNITUDES)
    levels = halves * carrier.stretch(int(halves[-1]), 4)
    return carrier.stored(torch.cat((-levels.flip(0), levels)))


@codebook("e2m1", bits=(4,))
def fit_e2m1(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    float_group_scales: bool = False,
    carrier: Carrier = INT8,
) -> Fit:
    """One table [16] for every weight, the scale of least squared error for each row or group of columns.

    weight [O, I]; importance [I]: weight of each column's squared error, e.g. the diagonal of X^T X.

    Raises:
        ValueError: for a weight that is not finite [O, I], bits other than 4, groups that do not divide I, or FP4 numbers
            without groups.
    """
    check_weight(weight, bits, group_size)
    if bits != 4:
        raise ValueError(f"the codebook 'e2m1' is a float format of 4 bits, not {bits}")
    if carrier is FLOAT4:
        return fit_blocks(weight, bits, e2m1_table(carrier), importance, group_size)
    return fit_scaled_table(weight, bits, e2m1_table(carrier)[None], importance, group_size, float_group_scales)
