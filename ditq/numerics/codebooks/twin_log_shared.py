"""Shared twin-log codebook: one table for the whole tensor, both signs alike, and one scale a row or a group.

The twin-log levels 2^(k d + l_0) - eta are mu-law companding, F(w) = ln(1 + mu |w|/M) / ln(1 + mu) with mu = M/eta, so
one number says how many levels go to the dense middle: mu -> 0 is uniform, a large mu is pure log2.
"""

from __future__ import annotations

import torch

from ditq.numerics.codebooks import codebook
from ditq.numerics.codebooks.uniform import CLIPS, fit_uniform
from ditq.numerics.row_search import SortedRows, group_multipliers, int8_levels, largest_carrier
from ditq.numerics.weight_code import SMALLEST_SCALE, Fit, check_weight, row_chunks

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # mu
_SAMPLE = 1 << 14  # rows or groups that mu is chosen on; a tensor of more gives every second, third, ... row


def mu_law_table(bits: int, mu: float) -> torch.Tensor:
    """+-L C_k rounded, C_k = ((1 + mu)^(u_k) - 1) / mu, u_k = (k + 1/2) / (n - 1/2), n = 2^(bits-1): int8 [2^bits].

    L is `largest_carrier(bits)`.

    Raises:
        ValueError: for bits outside 2..7 or a strength that is not positive.
    """
    if not 2 <= bits <= 7 or not mu > 0:
        raise ValueError(f"a mu-law table has 2 to 7 bits and a positive mu, not {bits} and {mu}")
    count = 1 << (bits - 1)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / (count - 0.5)
    largest = largest_carrier(bits)
    positive = int8_levels(largest * ((1 + mu) ** u - 1) / mu, largest)
    return torch.cat((-positive.flip(0), positive)).to(torch.int8)


def _best_scale(
    values: torch.Tensor, importance: torch.Tensor | None, tables: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """values [R, I], tables [T, L] -> each table's best scale float32 [T, R, G] and least error float64 [T]."""
    width = values.shape[1] // groups
    weights = None if importance is None else importance.float().expand_as(values).reshape(-1, width)
    rows = SortedRows(values.reshape(-1, width), weights)
    absmax = torch.maximum(rows.values[:, -1:], -rows.values[:, :1])
    candidates = (absmax * (torch.tensor(CLIPS, device=absmax.device) / tables.max())).clamp_min(SMALLEST_SCALE)
    scales, errors = [], []
    for table in tables.float():
        scale, error = rows.best_scale(table, candidates)
        scales.append(scale.unflatten(0, (-1, groups)))
        errors.append(error.sum())
    return torch.stack(scales), torch.stack(errors)


def _choose_table(
    weight: torch.Tensor, importance: torch.Tensor | None, tables: torch.Tensor, groups: int
) -> torch.Tensor:
    """The table [1, L] of least error over the tensor."""
    every = -(-len(weight) * groups // _SAMPLE)
    sample = weight[::every]
    total = torch.zeros(len(tables), dtype=torch.float64, device=weight.device)
    for part in row_chunks(*sample.shape):
        total += _best_scale(sample[part].float(), importance, tables, groups)[1]
    best = int(total.argmin())
    return tables[best : best + 1]


@codebook("twin_log_shared")
def fit_twin_log_shared(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    mu: float | None = None,
    float_group_scales: bool = False,
) -> Fit:
    """One table int8 [2^bits] for the tensor: mu of least error out of 0.25 .. 32, or the one given; scales by search.

    weight [O, I]; importance [I]: weight of each column's squared error, e.g. the diagonal of X^T X.
    The scale of a row (or of each run of `group_size` columns) is max|w| * (0.2 .. 1) / L of least squared error.
    Groups are uint8 multipliers of the row's scale, or scales of their own with `float_group_scales`.
    At 8 bits the int8 grid itself has 2^8 levels, so the fit is the uniform one.

    Raises:
        ValueError: for a weight that is not finite [O, I], bits outside 2..8, groups that do not divide I, or mu <= 0.
    """
    check_weight(weight, bits, group_size)
    if bits == 8:
        return fit_uniform(weight, bits, importance, group_size, float_group_scales=float_group_scales)
    rows, columns = weight.shape
    groups = columns // (group_size or columns)
    tables = torch.stack([mu_law_table(bits, m) for m in (STRENGTHS if mu is None else (mu,))]).to(weight.device)
    if len(tables) > 1:
        tables = _choose_table(weight, importance, tables, groups)
    scale = torch.cat(
        [_best_scale(weight[part].float(), importance, tables, groups)[0][0] for part in row_chunks(rows, columns)]
    )
    if group_size is None:
        return Fit(tables[0], scale[:, 0], None, bits)
    if float_group_scales:
        return Fit(tables[0], scale, None, bits, group_size)
    row, multiplier = group_multipliers(scale)
    return Fit(tables[0], row, multiplier, bits, group_size)
