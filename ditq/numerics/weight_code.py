"""A weight's code: b-bit codes, the levels that they stand for, and scales. Codebooks fit it, rounding fills it.

    carrier = table[code]                           int8 or FP8; the row's own table where there is one a row
    carrier = round(carrier * multiplier / 255)     on the carrier's grid, where groups of columns have a multiplier
    carrier = carrier * multiplier                  of FP4 numbers, whose blocks have FP8 scales (NVFP4)
    weight  = carrier * scale                       by row [O], or by row and group [O, G]
    weight += up diag(scale) down                   where there is a low-rank branch (low_rank.py)

The carrier is what an integer matrix product takes, so a 3-bit weight runs through the int8 kernel of an 8-bit one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ditq.numerics.carrier import E4M3, Carrier, carrier_of
from ditq.numerics.low_rank import LowRank

_AT_ONCE = 1 << 21  # elements of a weight that are widened at a time
SMALLEST_SCALE = 1e-30  # an all-zero row: positive, since kernels may divide by it, yet no weight that anyone can see


def row_chunks(rows: int, width: int, at_once: int = _AT_ONCE) -> Iterator[slice]:
    """Slices of rows of at most `at_once` elements, so that extra memory stays bounded for every size of weight."""
    step = max(1, at_once // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_weight(weight: torch.Tensor, bits: int, group_size: int | None = None) -> None:
    """Raises ValueError for what no codebook takes: rank, width by group, bits outside 2..8, values not finite."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"a weight is floating point [O, I], not {weight.dtype} {list(weight.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"weights are coded in 2 to 8 bits, not {bits}")
    if group_size is not None and (group_size < 1 or weight.shape[1] % group_size):
        raise ValueError(f"a width of {weight.shape[1]} does not divide into groups of {group_size}")
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight holds values that are not finite")


def multiplied(numbers: torch.Tensor, multiplier: torch.Tensor, carrier: Carrier) -> torch.Tensor:
    """The carrier's number next to numbers * multiplier / 255, float32. 255 is odd, so int8 has no ties to round.

    Where multipliers are FP8 numbers, numbers * multiplier as it is.
    """
    if multiplier.dtype == E4M3:
        return numbers.float() * multiplier.float()
    return carrier.nearest(numbers.float() * multiplier.float() / 255)


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """Ascending levels [..., L] -> the values [..., L - 1] halfway, where the nearest level changes."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()


@dataclass(frozen=True, eq=False)
class Fit:
    """The levels that were fitted to a weight [O, I], before any weight is rounded to one of them.

    table: numbers of a carrier in its dtype (carrier.py), [L] or, one a row, [O, L]; ascending, L = 2^bits. scale: float32
    [O] or [O, G]. multiplier: uint8 or FP8 [O, G], or None. group_size: I / G, or None where there are no groups.
    """

    table: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None
    bits: int
    group_size: int | None = None

    @property
    def groups(self) -> int:
        """G: how many scales a row has."""
        if self.multiplier is not None:
            return self.multiplier.shape[1]
        return self.scale.shape[1] if self.scale.dim() == 2 else 1

    def levels(self, rows: slice = slice(None), groups: slice = slice(None)) -> torch.Tensor:
        """The values that the codes stand for: float32 [rows, G, L], ascending along L."""
        carrier = self.table.float() if self.table.dim() == 1 else self.table[rows, None].float()
        if self.multiplier is not None:
            carrier = multiplied(carrier, self.multiplier[rows, groups, None], carrier_of(self.table))
        scale = self.scale[rows, groups] if self.scale.dim() == 2 else self.scale[rows, None]
        return carrier * scale[:, :, None]


@dataclass(frozen=True, eq=False)
class WeightCode:
    """A coded weight: codes uint8 [O, I] with the table, scale and multiplier of its `Fit`; beside them a branch, or None.

    codebook: the name of the one that was fitted, where the name is known.
    """

    codes: torch.Tensor
    table: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None
    bits: int
    low_rank: LowRank | None = None
    codebook: str = ""

    def to(self, device: torch.device) -> WeightCode:
        """The same there."""
        branch = None if self.low_rank is None else self.low_rank.to(device)
        multiplier = None if self.multiplier is None else self.multiplier.to(device)
        codes, table, scale = (tensor.to(device) for tensor in (self.codes, self.table, self.scale))
        return replace(self, codes=codes, table=table, scale=scale, multiplier=multiplier, low_rank=branch)

    def _carrier_rows(self, rows: slice) -> torch.Tensor:
        index = self.codes[rows].long()
        row = torch.arange(len(index), device=index.device)[:, None]  # torch indexes FP8, but does not gather it
        numbers = self.table[index] if self.table.dim() == 1 else self.table[rows][row, index]
        if self.multiplier is None:
            return numbers
        carrier = carrier_of(self.table)
        grouped = numbers.unflatten(1, (self.multiplier.shape[1], -1))
        product = multiplied(grouped, self.multiplier[rows, :, None], carrier).flatten(1)
        return product if self.multiplier.dtype == E4M3 else carrier.stored(product)

    def carrier(self) -> torch.Tensor:
        """[O, I] in the carrier's dtype, or float32 with FP8 multipliers: what the matrix product multiplies."""
        return torch.cat([self._carrier_rows(rows) for rows in row_chunks(*self.codes.shape)])

    def decode(self) -> torch.Tensor:
        """float32 [O, I]: the weight that the codes stand for, with the branch."""
        scale = self.scale if self.scale.dim() == 2 else self.scale[:, None]
        carrier = self.carrier().float().unflatten(1, (scale.shape[1], -1))
        decoded = (carrier * scale[:, :, None]).flatten(1)
        return decoded if self.low_rank is None else decoded + self.low_rank.product()


def check_fit(weight: torch.Tensor, fit: Fit) -> None:
    """Raises ValueError when no codebook takes the weight, or the fit was made for a weight of another shape."""
    check_weight(weight, fit.bits, fit.group_size)
    rows, columns = weight.shape
    if fit.scale.shape[0] != rows or columns != (fit.group_size or columns) * fit.groups:
        raise ValueError(f"a fit of scales {list(fit.scale.shape)} is not of a weight {list(weight.shape)}")


def encode(weight: torch.Tensor, fit: Fit) -> WeightCode:
    """weight [O, I] -> the code of the nearest level in value, each weight on its own; halfway, the lower one.

    Raises:
        ValueError: when the fit was made for another shape, or the weight is not finite.
    """
    check_fit(weight, fit)
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    width = columns + fit.groups * fit.table.shape[-1]
    for part in row_chunks(rows, width):
        values = weight[part].float().unflatten(1, (fit.groups, -1))
        codes[part] = torch.searchsorted(midpoints(fit.levels(part)), values).flatten(1).to(torch.uint8)
    return WeightCode(codes, fit.table, fit.scale, fit.multiplier, fit.bits)
