"""Second moments of an input that passes have changed: made when they are read, for most passes need only their trace.

A channel that hardly moves about a mean c has a variance that is the difference of two sums of c^2, and sums in float32 are
off by far more than a bit: what is added is the same each time, and so is how it is rounded. Where no more is left of a channel
than that, its row and column say nothing, and scaled up they spoil the whole matrix; the sampled rows say what its square is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditq.numerics.rotation import Rotation

AT_ONCE = (
    1 << 23
)  # elements that are widened to float64 at a time: a matrix of 15360 channels alone has 28 times as many

ROUNDING = 2.0**-24  # of a sum, at most, when a number is added to it in float32
ADDED = 512  # rows to an addition: products of 1024 were off by 1.4 roundings each, of a channel that is constant
WITHIN = 256  # roundings within one product

Rotations = Sequence[tuple[int, int, Rotation]]


@dataclass(frozen=True, eq=False)
class ChangedMoments:
    """Sums of x'^T x', x' = (x * scale - shift) R, of which those of x are known.

    With D = diag(scale), s = shift, M = sum x^T x, t = sum x over n rows: M' = R^T (D M D - D t s^T - s t^T D + n s s^T) R.

    Attributes:
        moments: float32 [M, C, C], sums of x^T x.
        totals: float64 [M, C], sums of x.
        rows: n of each.
        scale, shift: float64 [C].
        sampled: float64 [M, C], sums of the squares of x' before R, as the sampled rows have them.
        rotations: R rotates the channels [start, stop) of each (start, stop, rotation).
    """

    moments: Tensor
    totals: Tensor
    rows: Sequence[int]
    scale: Tensor
    shift: Tensor
    rotations: Rotations
    sampled: Tensor

    def squares(self) -> Tensor:
        """float64 [M, C]: the diagonals without R, which leaves their sums as they are."""
        return self._squares()[0]

    def _squares(self) -> tuple[Tensor, Tensor]:
        """(`squares`; bool [M, C], of which channels rounding has left nothing, so that the sample tells them)."""
        sums = self.totals * self.scale
        count = torch.tensor(self.rows, dtype=torch.float64)[:, None]
        known = self.moments.diagonal(dim1=1, dim2=2).double() * self.scale**2
        left = known - 2 * sums * self.shift + count * self.shift**2
        lost = left < ROUNDING * (WITHIN + count / ADDED) * (known + count * self.shift**2)
        return torch.where(lost, self.sampled, left), lost

    def whole(self) -> Tensor:
        """float32 [M, C, C]: M', computed in float64 a band of rows at a time and rounded once before each side of R."""
        made = torch.empty_like(self.moments)
        parts = zip(self.moments, self.totals, self.rows, made, *self._squares(), strict=True)
        for moment, total, rows, out, squares, lost in parts:
            sums = total * self.scale
            height = max(1, AT_ONCE // len(moment))
            bands = [slice(start, start + height) for start in range(0, len(moment), height)]
            for band in bands:
                part = moment[band].double() * self.scale * self.scale[band, None]
                part -= torch.outer(sums[band], self.shift) + torch.outer(self.shift[band], sums - rows * self.shift)
                if lost.any():
                    part[:, lost] = 0
                    part[lost[band]] = 0
                    part.diagonal(band.start)[lost[band]] = squares[band][lost[band]]
                out[band] = rotated(part, self.rotations)
            if self.rotations:
                for band in bands:
                    out[:, band] = rotated(out[:, band].T.double(), self.rotations).T
                # Rounding between the sides leaves halves that differ in the last bit.
                for band in bands:
                    out[band.stop :, band] = out[band, band.stop :].T
                    out[band, band] = (out[band, band] + out[band, band].T) / 2
        return made


def rotated(x: Tensor, rotations: Rotations) -> Tensor:
    """x [..., C] with the channels of each range rotated."""
    x = x.clone()
    for start, stop, rotation in rotations:
        x[..., start:stop] = rotation.apply(x[..., start:stop])
    return x
