"""Exact squared errors of a codebook on whole rows, in time that hardly depends on the row's length.

A row is sorted once and its weighted sums are accumulated; the error of any set of levels then needs only the sums at
the midpoints between levels. That makes a grid search over hundreds of codebooks affordable, with no histogram. Short
rows, such as groups of columns, are rounded value by value instead.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

_QUERIES = 1 << 20  # levels whose error is found at a time
_SHORT = 6  # values a level up to which rounding a row costs less than sorting it and asking for sums
_ROUNDED = 1 << 18  # values that are rounded at a time, so that they stay in the processor's cache


class SortedRows:
    """Rows [R, N] ready for error queries. importance: the weight h of each element's squared error, [R, N] or None."""

    def __init__(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        self.values, order = rows.float().sort(dim=1)
        values = self.values.double()
        self._mass: torch.Tensor | None = None  # accumulated importance [R, N + 1]; None stands for 0, 1, 2, ..., N
        if importance is not None:
            weights = importance.double().gather(1, order)
            self._mass = pad(weights.cumsum(1), (1, 0))
            values = values * weights
        self._moment = pad(values.cumsum(1), (1, 0))
        end = torch.full((len(rows), 1), rows.shape[1], device=rows.device)
        zero = torch.searchsorted(self.values, torch.zeros_like(self.values[:, :1]))
        self._span = {-1: (torch.zeros_like(end), zero), 0: (torch.zeros_like(end), end), 1: (zero, end)}

    def _sums(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of h and of h w over the first `index` values of each row: float64, shaped like index [R, M]."""
        mass = index.double() if self._mass is None else self._mass.gather(1, index)
        return mass, self._moment.gather(1, index)

    def error(self, levels: torch.Tensor, sign: int = 0) -> torch.Tensor:
        """Sum of h (nearest level - w)^2 over each row, less the row's own sum of h w^2: float64 [R, K].

        levels [R, K, L], ascending: K sets of levels a row. sign: -1 or +1 counts the values of that sign only, and
        then all levels have it. What is left out does not depend on the levels, so it changes no comparison.

        With M(t), S(t) the sums of h and h w below t, and t_k the midpoint of v_k and v_(k+1), the sum of
        h (v^2 - 2 v w) over all cells is, by parts, v_L^2 M - 2 v_L S - 2 sum_k (v_(k+1) - v_k)(t_k M(t_k) - S(t_k)).
        """
        levels = levels.double()
        midpoints = (levels[..., 1:] + levels[..., :-1]) / 2
        below_mass, below_moment = self._sums(torch.searchsorted(self.values, midpoints.flatten(1).float()))
        start, stop = self._span[sign]
        mass, moment = self._sums(stop)
        if sign > 0:
            first_mass, first_moment = self._sums(start)
            mass, moment = mass - first_mass, moment - first_moment
            below_mass, below_moment = below_mass - first_mass, below_moment - first_moment
        inner = midpoints.mul_(below_mass.view_as(midpoints)).sub_(below_moment.view_as(midpoints))
        top = levels[..., -1]
        return top * (top * mass - 2 * moment) - 2 * inner.mul_(levels.diff(dim=-1)).sum(dim=-1)

    def best_scale(self, table: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row the scale s of least error with the levels table * s: (scale float32 [R], error float64 [R]).

        table [L], ascending. scales: candidates, float32 [R, K].
        """
        at_once = max(1, _QUERIES // (len(scales) * len(table)))
        errors = [self.error(part[:, :, None] * table) for part in scales.split(at_once, dim=1)]
        error, best = torch.cat(errors, dim=1).min(dim=1)
        return scales.gather(1, best[:, None])[:, 0], error


class ShortRows:
    """Rows [R, N] of which every value is rounded for every candidate; for few values a level. Otherwise as SortedRows."""

    def __init__(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        self.values, self._importance = rows.float(), importance

    def best_scale(self, table: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SortedRows.best_scale`, with a table of whole numbers.

        The midpoints between whole numbers are multiples of 1/2, so the nearest level to u is known from ceil(2 u).
        """
        doubled = torch.arange(int(2 * table[0]), int(2 * table[-1]) + 1, device=table.device)
        nearest = table[torch.searchsorted(table[1:] + table[:-1], doubled.float())]
        found, errors = [], []
        for part in torch.arange(len(scales)).split(max(1, _ROUNDED // self.values.shape[1])):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            error = torch.stack([self._error(rows, nearest, doubled[0], scale[:, None]) for scale in scales[rows].T], 1)
            least, best = error.min(dim=1)
            found.append(scales[rows].gather(1, best[:, None])[:, 0])
            errors.append(least)
        return torch.cat(found), torch.cat(errors)

    def _error(self, rows: slice, nearest: torch.Tensor, first: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Sum of h (nearest level - w)^2 over each row, float64 [R]; nearest[i] is the level of ceil(2 u) = first + i."""
        units = self.values[rows] / scale
        index = (2 * units).ceil_().sub_(first).clamp_(0, len(nearest) - 1)
        error = nearest[index.long()].sub_(units).square_()
        if self._importance is not None:
            error *= self._importance[rows]
        return error.sum(dim=1).double() * scale[:, 0].double().square()


def rows_for(rows: torch.Tensor, importance: torch.Tensor | None, tables: torch.Tensor) -> SortedRows | ShortRows:
    """The quicker of the two for tables [T, L]: rows [R, N], importance [R, N] or None."""
    short = rows.shape[1] < _SHORT * tables.shape[1] and bool((tables == tables.round()).all())
    return (ShortRows if short else SortedRows)(rows, importance)


def group_multipliers(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Group scales [O, G] -> row scale [O] (the largest) and uint8 [O, G] with scale ~ row scale * multiplier / 255."""
    row = scale.amax(dim=1)
    return row, (scale / row[:, None] * 255).round().clamp(1, 255).to(torch.uint8)
