"""Exact squared errors of a codebook on whole rows, in time that hardly depends on the row's length.

A row is sorted once and its weighted sums are accumulated; the error of any set of levels then needs only the sums at
the midpoints between levels. That makes a grid search over hundreds of codebooks affordable, with no histogram.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import pad

from ditq.numerics.weight_code import SMALLEST_SCALE


class SortedRows:
    """Rows [R, N] ready for error queries. importance: the weight of each element's squared error, [R, N] or None."""

    def __init__(self, rows: torch.Tensor, importance: torch.Tensor | None = None) -> None:
        self.values, order = rows.float().sort(dim=1)
        values = self.values.double()
        self._mass: torch.Tensor | None = None  # accumulated importance [R, N + 1]; None stands for 0, 1, 2, ..., N
        if importance is not None:
            weights = importance.double().gather(1, order)
            self._mass = pad(weights.cumsum(1), (1, 0))
            values = values * weights
        self._moment = pad(values.cumsum(1), (1, 0))

    def zero_index(self) -> torch.Tensor:
        """How many values of each row are negative: int64 [R, 1]."""
        return torch.searchsorted(self.values, torch.zeros_like(self.values[:, :1]))

    def error(
        self, levels: torch.Tensor, start: torch.Tensor | None = None, stop: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of h (nearest level - w)^2 over each row, less the row's own sum of h w^2: float64 [R].

        levels [R, L], ascending. start, stop [R, 1]: only these sorted values of each row, by default all of them.
        What is left out does not depend on the levels, so it changes no comparison.
        """
        count = self.values.shape[1]
        first = torch.zeros_like(self.values[:, :1], dtype=torch.int64) if start is None else start
        last = torch.full_like(first, count) if stop is None else stop
        midpoints = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(self.values, midpoints)
        edges = torch.cat((first, torch.minimum(torch.maximum(inner, first), last), last), dim=1)
        mass = (edges.double() if self._mass is None else self._mass.gather(1, edges)).diff(dim=1)
        moment = self._moment.gather(1, edges).diff(dim=1)
        levels = levels.double()
        return (levels * (levels * mass - 2 * moment)).sum(dim=1)

    def best_scale(self, table: torch.Tensor, scales: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row the scale s of least error with the levels table * s: (scale float32 [R], error float64 [R]).

        table [L] or [R, L], ascending. scales: candidates, float32 [R] each.
        """
        best_error = torch.full((self.values.shape[0],), torch.inf, dtype=torch.float64, device=self.values.device)
        best = torch.full_like(self.values[:, 0], SMALLEST_SCALE)
        for scale in scales:
            error = self.error(table * scale[:, None])
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
        return best, best_error


def group_multipliers(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Group scales [O, G] -> row scale [O] (the largest) and uint8 [O, G] with scale ~ row scale * multiplier / 255."""
    row = scale.amax(dim=1)
    return row, (scale / row[:, None] * 255).round().clamp(1, 255).to(torch.uint8)


def int8_levels(levels: torch.Tensor) -> torch.Tensor:
    """Positive levels [..., n], ascending, in steps of the int8 grid -> whole numbers 1..127, all different.

    Plain rounding, except where two levels would fall together: those move up to the next free whole number, so that no
    code is wasted.
    """
    order = torch.arange(levels.shape[-1], dtype=levels.dtype, device=levels.device)
    spread = (levels.round().clamp_min(1) - order).cummax(dim=-1).values + order
    return torch.minimum(spread, 127 - order.flip(0))
