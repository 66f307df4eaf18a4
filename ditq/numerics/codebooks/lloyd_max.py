"""Lloyd-Max codebook: the levels of least squared error for the weights themselves, one table a tensor.

Lloyd's two conditions (Lloyd 1982, IEEE Trans. Inf. Theory 28, section V) by turns: each level is the weighted mean of the
values nearest to it, each value goes to its nearest level. Values are weights over the scale of their row or group, and
scales and levels take turns as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditq.numerics.carrier import INT8, Carrier
from ditq.numerics.codebooks import codebook
from ditq.numerics.codebooks.nf import normal_table
from ditq.numerics.codebooks.twin_log_shared import STRENGTHS, mu_law_table
from ditq.numerics.codebooks.uniform import fit_uniform
from ditq.numerics.scaled_table import best_scales, fit_scaled_table, sample_of
from ditq.numerics.weight_code import Fit, check_weight

ROUNDS = 4  # turns of scales and levels
_TURNS = 200  # of Lloyd's iteration, which a histogram makes cheap
_SETTLED = 1e-3  # units of the carrier: levels that move less stay where they are
_BINS_A_STEP = 16  # of the histogram, for each unit of the carrier


@dataclass(frozen=True, eq=False)
class Histogram:
    """Values in units of the carrier, by bins [N]: upper edges, and accumulated sums of h and h u up to each, [N + 1]."""

    edges: Tensor
    mass: Tensor
    moment: Tensor

    @classmethod
    def of(cls, values: Tensor, importance: Tensor) -> Histogram:
        """values, importance [R, N] -> the histogram; sums are exact, only the assignment to levels goes by bins."""
        bins = (values * _BINS_A_STEP).floor().long()
        first, last = int(bins.min()), int(bins.max())
        place = (bins - first).flatten()
        weights = importance.double().flatten()
        mass = torch.bincount(place, weights, minlength=last - first + 1).cumsum(0)
        moment = torch.bincount(place, weights * values.double().flatten(), minlength=last - first + 1).cumsum(0)
        edges = torch.arange(first + 1, last + 2, device=values.device).double() / _BINS_A_STEP
        zero = mass.new_zeros(1)
        return cls(edges, torch.cat((zero, mass)), torch.cat((zero, moment)))

    def means(self, levels: Tensor) -> Tensor:
        """The mean of the values nearest to each level [L], ascending; a level that has none stays."""
        inner = torch.searchsorted(self.edges, (levels[1:] + levels[:-1]) / 2, right=True)
        borders = torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), len(self.edges))))
        mass, moment = self.mass[borders].diff(), self.moment[borders].diff()
        return torch.where(mass > 0, moment / mass, levels)


def lloyd(values: Histogram, levels: Tensor) -> Tensor:
    """Lloyd's iteration from `levels` [L] until it settles: float64 [L], ascending."""
    for _ in range(_TURNS):
        moved = values.means(levels)
        settled, levels = float((moved - levels).abs().max()) < _SETTLED, moved
        if settled:
            break
    return levels


def _fitted_table(weight: Tensor, bits: int, importance: Tensor | None, groups: int, carrier: Carrier) -> Tensor:
    """The table [2^bits] of least error on the rows [R, I]: of those that it starts from, or one that came of them."""
    largest = carrier.largest(bits)
    tables = [normal_table(bits, carrier), *(mu_law_table(bits, mu, carrier) for mu in STRENGTHS)]
    start = torch.stack(tables).to(weight.device)
    scales, errors = best_scales(weight, start, importance, groups)
    at = int(errors.argmin())
    table, scale, least = start[at], scales[at], errors[at]
    values = weight.float().unflatten(1, (groups, -1))
    weights = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    weights = weights.view(1, groups, -1)
    for _ in range(ROUNDS):
        unit = scale[:, :, None]
        relative = unit.double() / unit.double().amax()  # an error of a step counts by the square of what a step is
        found = Histogram.of(values / unit, (weights * relative.square()).expand_as(values))
        levels = lloyd(found, table.double())
        moved = carrier.stored(carrier.distinct(levels * (largest / levels.abs().max()), largest, -largest))
        scales, errors = best_scales(weight, moved[None], importance, groups)
        if not errors[0] < least:
            break
        table, scale, least = moved, scales[0], errors[0]
    return table


@codebook("lloyd_max")
def fit_lloyd_max(
    weight: torch.Tensor,
    bits: int,
    importance: torch.Tensor | None = None,
    group_size: int | None = None,
    float_group_scales: bool = False,
    carrier: Carrier = INT8,
) -> Fit:
    """One table [2^bits] fitted to the tensor, the scale of least squared error for each row or group of columns.

    weight [O, I]; importance [I]: weight of each column's squared error, e.g. the diagonal of X^T X.
    It starts from the best of the normal and the mu-law tables and goes on as long as the error on a sample of the rows
    falls, so that it is no worse there than those. The levels need not be symmetric.
    At 8 bits the carrier's own numbers are the levels, so the fit is the uniform one.

    Raises:
        ValueError: for a weight that is not finite [O, I], bits outside 2..8, or groups that do not divide I.
    """
    check_weight(weight, bits, group_size)
    if bits == 8:
        return fit_uniform(weight, bits, importance, group_size, float_group_scales=float_group_scales, carrier=carrier)
    groups = weight.shape[1] // (group_size or weight.shape[1])
    table = _fitted_table(sample_of(weight, groups), bits, importance, groups, carrier)
    return fit_scaled_table(weight, bits, table[None], importance, group_size, float_group_scales)
