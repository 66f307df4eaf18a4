"""One table for a whole tensor, times a scale a row or a group: the search that every such codebook shares.

A codebook of this kind says which levels it has on the carrier's grid (or which tables to choose from);
`fit_scaled_table` does the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditq.numerics.row_search import group_multipliers, rows_for
from ditq.numerics.weight_code import SMALLEST_SCALE, Fit, row_chunks

CLIPS = tuple(0.2 + 0.025 * i for i in range(33))  # fractions of max|w| that the largest level may stand at
_SAMPLE_ROWS = 1 << 14  # rows or groups that a table is chosen on; a tensor of more gives every second, third, ... row
_SAMPLE_ELEMENTS = 1 << 22


def fit_scaled_table(
    weight: Tensor,
    bits: int,
    tables: Tensor,
    importance: Tensor | None = None,
    group_size: int | None = None,
    float_group_scales: bool = False,
) -> Fit:
    """weight [O, I], tables [T, 2^bits] of a carrier's numbers, each ascending -> the table of least error and its scales.

    The table is chosen on a sample of the rows. The scale of a row (or of each run of `group_size` columns) is
    max|w| * (0.2 .. 1) over the table's largest magnitude, the one of least squared error; importance [I] weighs columns.
    Groups are uint8 multipliers of the row's scale, or scales of their own with `float_group_scales`.
    """
    groups = weight.shape[1] // (group_size or weight.shape[1])
    table = tables.to(weight.device)[0]
    if len(tables) > 1:
        errors = best_scales(sample_of(weight, groups), tables.to(weight.device), importance, groups)[1]
        table = tables.to(weight.device)[int(errors.argmin())]
    scale = best_scales(weight, table[None], importance, groups)[0][0]
    return scaled_fit(table, scale, bits, group_size, float_group_scales)


def scaled_fit(table: Tensor, scale: Tensor, bits: int, group_size: int | None, float_group_scales: bool) -> Fit:
    """table [L] and scale float32 [O, G] as a `Fit`: one scale a row, scales of groups, or multipliers."""
    if group_size is None:
        return Fit(table, scale[:, 0], None, bits)
    if float_group_scales:
        return Fit(table, scale, None, bits, group_size)
    row, multiplier = group_multipliers(scale)
    return Fit(table, row, multiplier, bits, group_size)


def sample_of(weight: Tensor, groups: int = 1) -> Tensor:
    """Evenly spaced rows of the weight [O, I]: enough to choose a table on, whatever the size of the tensor."""
    rows, columns = weight.shape
    return weight[:: max(-(-rows * groups // _SAMPLE_ROWS), -(-rows * columns // _SAMPLE_ELEMENTS))]


def best_scales(
    weight: Tensor, tables: Tensor, importance: Tensor | None = None, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """weight [O, I], tables [T, L], each ascending -> each table's best scales float32 [T, O, G], least error float64 [T].

    The errors of a call can be compared with each other; what they have in common is left out.
    """
    rows, columns = weight.shape
    scale = torch.empty(len(tables), rows, groups, device=weight.device)
    total = torch.zeros(len(tables), dtype=torch.float64, device=weight.device)
    for part in row_chunks(rows, columns):
        values = weight[part].float()
        weights = None if importance is None else importance.float().expand_as(values).reshape(-1, columns // groups)
        runs = values.reshape(-1, columns // groups)
        clipped = runs.abs().amax(dim=1, keepdim=True) * torch.tensor(CLIPS, device=runs.device)
        search = rows_for(runs, weights, tables.float())
        for number, table in enumerate(tables.float()):
            candidates = (clipped / table.abs().max()).clamp_min(SMALLEST_SCALE)
            found, errors = search.best_scale(table, candidates)
            scale[number, part] = found.unflatten(0, (-1, groups))
            total[number] += errors.sum()
    return scale, total
