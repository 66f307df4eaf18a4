"""Twin-log codebook: magnitudes on a logarithmic scale with an offset, each sign of each row with levels of its own.

The twin-log quantization (TLQ) of LRQ-DiT (arXiv 2508.03485, eq. 7) with its range searched on the masked values only:
exactly 2^b codes, one bit of sign and b - 1 of log-magnitude, no code for zero.
"""

from __future__ import annotations

import torch

from ditq.numerics.carrier import INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.codebooks.uniform import fit_uniform
from ditq.numerics.row_search import SortedRows
from ditq.numerics.weight_code import SMALLEST_SCALE, Fit, check_weight, row_chunks

OFFSETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # eta over the largest magnitude of the sign
CLIPS = tuple(0.3 + 0.05 * i for i in range(15))  # alpha, beta: the top level over the largest magnitude of the sign


def unit_levels(count: int, offset: float, clip: float) -> torch.Tensor:
    """v_k = 2^(l_0 + k d) - eta, k = 0 .. count - 1, for a largest magnitude of 1: float32 [count], ending at `clip`.

    The line runs from log2(eta), magnitude 0, half a step below the first level, to log2(clip + eta).
    """
    low = torch.log2(torch.tensor(offset, dtype=torch.float64))
    high = torch.log2(torch.tensor(clip + offset, dtype=torch.float64))
    step = (high - low) / (count - 0.5)
    return (2 ** (low + (torch.arange(count) + 0.5) * step) - offset).float()


def _best_levels(rows: SortedRows, count: int, sign: int) -> torch.Tensor:
    """The best magnitudes for one sign of each row: float32 [R, count], ascending; zeros where the sign is missing."""
    edge = rows.values[:, -1] if sign > 0 else -rows.values[:, 0]
    largest = edge.clamp_min(0)[:, None]
    best = torch.zeros_like(largest).repeat(1, count)
    best_error = torch.full_like(edge, torch.inf, dtype=torch.float64)
    for offset in OFFSETS:
        units = torch.stack([unit_levels(count, offset, clip) for clip in CLIPS]).to(largest.device)
        magnitudes = largest[:, :, None] * units
        error, clip = rows.error(magnitudes if sign > 0 else -magnitudes.flip(2), sign).min(dim=1)
        better = error < best_error
        best = torch.where(better[:, None], largest * units[clip], best)
        best_error = torch.where(better, error, best_error)
    return best


def _fit_rows(
    values: torch.Tensor, bits: int, importance: torch.Tensor | None, carrier: Carrier
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, I] -> (table [R, 2^bits], scale float32 [R])."""
    rows = SortedRows(values, None if importance is None else importance.expand_as(values))
    count = 1 << (bits - 1)
    positive, negative = _best_levels(rows, count, 1), _best_levels(rows, count, -1)
    # a row without one of the signs still has 2^bits codes: the missing side mirrors the other
    positive = torch.where(positive[:, -1:] > 0, positive, negative)
    negative = torch.where(negative[:, -1:] > 0, negative, positive)
    largest = carrier.largest(bits)
    scale = (torch.maximum(positive[:, -1], negative[:, -1]) / largest).clamp_min(SMALLEST_SCALE)
    below, above = (carrier.distinct(levels / scale[:, None], largest) for levels in (negative, positive))
    return carrier.stored(torch.cat((-below.flip(1), above), dim=1)), scale


@codebook("twin_log", groups=False)
def fit_twin_log(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    float_group_scales: bool = False,
    carrier: Carrier = INT8,
) -> Fit:
    """One table a row, [O, 2^bits]: levels +(2^(l_0 + k d) - eta) and -(2^(l_0' + k d') - eta'), on the carrier's grid.

    For each row and each sign, eta and the clip (alpha or beta in the paper) are those of least squared error on a grid
    relative to the sign's own largest magnitude, so the result does not depend on the weight's scale. The two signs'
    errors are separable. The row's scale puts its largest level at the carrier's `largest`, and the others are
    rounded to its grid.

    weight [O, I]; importance [I]: weight of each column's squared error, e.g. the diagonal of X^T X.
    At 8 bits the carrier's own numbers are the levels, so the fit is the uniform one.

    Raises:
        ValueError: for a weight that is not finite [O, I], bits outside 2..8, or a group size: a table covers its row.
    """
    if group_size is not None or float_group_scales:
        raise ValueError("the codebook 'twin_log' has one table a row and no groups; 'twin_log_shared' has groups")
    check_weight(weight, bits)
    if bits == 8:
        return fit_uniform(weight, bits, importance, carrier=carrier)
    tables, scales = [], []
    for part in row_chunks(*weight.shape):
        table, scale = _fit_rows(weight[part].float(), bits, importance, carrier)
        tables.append(table)
        scales.append(scale)
    return Fit(torch.cat(tables), torch.cat(scales), None, bits)
