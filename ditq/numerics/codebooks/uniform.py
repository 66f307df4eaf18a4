"""Symmetric uniform codebook: levels a whole number of steps apart. The baseline, and the right choice at 8 bits."""

from __future__ import annotations

import torch

from ditq.numerics.carrier import INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.scaled_table import CLIPS, fit_scaled_table, scaled_fit
from ditq.numerics.weight_code import SMALLEST_SCALE, Fit, check_weight, row_chunks


def _search(groups: torch.Tensor, bits: int, importance: torch.Tensor | None, clips: tuple[float, ...]) -> torch.Tensor:
    """The scale of least squared error of each row of `groups` [R, N]: float32 [R]."""
    largest = (1 << (bits - 1)) - 1
    absmax = groups.abs().amax(dim=1, keepdim=True)
    exponent = torch.frexp(absmax).exponent.clamp(
        -120, 120
    )  # of rows around 1 no square is too large or too small, and no digit changes
    groups, absmax = torch.ldexp(groups, -exponent), torch.ldexp(absmax, -exponent)
    best = torch.full_like(absmax, SMALLEST_SCALE)
    best_error = torch.full_like(absmax, torch.inf)
    for clip in clips:
        scale = (absmax * (clip / largest)).clamp_min(SMALLEST_SCALE)
        error = (groups / scale).round_().clamp_(-largest - 1, largest).mul_(scale).sub_(groups).square_()
        if importance is not None:
            error *= importance
        total = error.sum(dim=1, keepdim=True)
        better = total < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, total, best_error)
    return torch.ldexp(best, exponent).clamp_min(SMALLEST_SCALE)[:, 0]


@codebook("uniform")
def fit_uniform(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    clip_search: bool = True,
    float_group_scales: bool = False,
    carrier: Carrier = INT8,
) -> Fit:
    """Levels q s with q = -2^(bits-1) .. 2^(bits-1) - 1, one scale s a row or a group.

    weight [O, I]; importance [I]: weight of each column's squared error, e.g. the diagonal of X^T X.
    clip_search: try max|w| * (0.2 .. 1) for the top level and keep the least error; False is plain absmax.
    group_size: one scale for each run of so many columns, as uint8 multipliers of the row's scale, or as scales of
    their own with `float_group_scales`. For multipliers the table is stretched to the whole int8 range, since they
    scale carriers, which are whole numbers. Where the carrier has no evenly spaced numbers, they are the ones next to that.

    Raises:
        ValueError: for a weight that is not finite [O, I], bits outside 2..8, or groups that do not divide I.
    """
    check_weight(weight, bits, group_size)
    half = 1 << (bits - 1)
    multiplied = group_size is not None and not float_group_scales
    stretch = max(1, (64 if bits <= 4 else 128) // half) if multiplied else 1
    even = torch.arange(-half, half) * float(stretch)
    table = carrier.grid() if bits == 8 else carrier.stored(carrier.nearest(even))
    if not torch.equal(table.float(), even):  # of FP8 from 6 bits on
        return fit_scaled_table(weight, bits, table[None], importance, group_size, float_group_scales)
    rows, columns = weight.shape
    groups = columns // (group_size or columns)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    for part in row_chunks(rows, columns):
        values = weight[part].float()
        weights = None if importance is None else importance.float().expand_as(values).reshape(-1, columns // groups)
        clips = CLIPS if clip_search else (1.0,)
        scale[part] = _search(values.reshape(-1, columns // groups), bits, weights, clips).unflatten(0, (-1, groups))
    return scaled_fit(table.to(weight.device), scale / stretch, bits, group_size, float_group_scales)
