"""The scales of NVFP4's blocks: one FP8 number (E4M3) for each run of columns, times a float of the row.

    weight ~ number * block * row        number E2M1, block E4M3, row float32

NVIDIA's format has one float a tensor, which stands in front of the product. One a row costs the same where it stands behind
the product, with the cast of what that gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditq.numerics.carrier import E4M3, FLOAT8, LARGEST_E4M3, SMALLEST_E4M3
from ditq.numerics.row_search import rows_for
from ditq.numerics.weight_code import SMALLEST_SCALE, Fit, row_chunks

FACTORS = tuple(
    0.4 + 0.05 * i for i in range(15)
)  # of the scale with which a block's largest weight is the largest number


def fit_blocks(weight: Tensor, bits: int, table: Tensor, importance: Tensor | None, group_size: int | None) -> Fit:
    """weight [O, I], table [L] of FP4 numbers, ascending -> scales of the rows, and of the blocks of `group_size` columns.

    The row's scale is max|w| of the row over the largest block scale, 448, and the largest number. That of a block is the FP8
    number near max|w| * (0.4 .. 1.1) of least squared error; importance [I] weighs columns.

    Raises:
        ValueError: no groups.
    """
    if group_size is None:
        raise ValueError("FP4 numbers stand in blocks with a scale each; give a group_size")
    table = table.to(weight.device)
    rows, groups, top = len(weight), weight.shape[1] // group_size, float(table.float().max())
    row = torch.empty(rows, device=weight.device)
    multiplier = torch.empty(rows, groups, dtype=E4M3, device=weight.device)
    # Doubled, FP4 numbers are whole, for which the search is quick.
    doubled, factors = 2 * table.float(), torch.tensor(FACTORS, device=weight.device)
    for part in row_chunks(*weight.shape):
        values = weight[part].float()
        row[part] = (values.abs().amax(1) / (top * LARGEST_E4M3)).clamp_min(SMALLEST_SCALE)
        runs = (values / row[part, None]).reshape(-1, group_size)
        weights = None if importance is None else importance.float().expand_as(values).reshape(-1, group_size)
        wanted = runs.abs().amax(1, keepdim=True) / top * factors
        candidates = FLOAT8.nearest(wanted).clamp_min(SMALLEST_E4M3)
        found = rows_for(runs, weights, doubled[None]).best_scale(doubled, candidates / 2)[0]
        multiplier[part] = (2 * found).view(-1, groups).to(E4M3)
    return Fit(table, row, multiplier, bits, group_size)


def rescaled_blocks(row: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Any scales of rows [O] and blocks float [O, G], above 0 -> the nearest such whose blocks are FP8 numbers up to 448."""
    largest = block.amax(1) / LARGEST_E4M3
    numbers = FLOAT8.nearest(block / largest[:, None]).clamp_min(SMALLEST_E4M3).to(E4M3)
    return (row * largest).clamp_min(SMALLEST_SCALE), numbers
