"""What is known of one linear input, or of several linears that share it: sums over all rows, by timestep bin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ditq.calibration.accumulate import crest_factors
from ditq.calibration.second_moments import ChangedMoments, rotated
from ditq.errors import DitqError
from ditq.numerics.rotation import Rotation

# Names in files, as the fields stand.
PARTS = ("count", "second_moment", "total", "absmax", "crest", "sample", "sample_bin")


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """One linear input x [rows, C] over all recorded calls; rows are tokens (samples for a modulation vector), B bins.

    Attributes:
        count: int64 [B], rows seen.
        moments: float32 [B, C, C], sum of x^T x; [1, C, C] where it was summed over all bins, as of large models; or, of a
            changed input, what makes them. Read them as `second_moment`.
        total: float32 [B, C], sum of x.
        absmax: float32 [B, C], max |x|.
        crest: float32 [B], mean over rows of max|x| / rms(x); 0 for an empty bin.
        sample: float32 [rows, C], a uniform random sample of the rows of each bin.
        sample_bin: int64 [rows], the bin of each sampled row.
    """

    count: Tensor
    moments: Tensor | ChangedMoments
    total: Tensor
    absmax: Tensor
    crest: Tensor
    sample: Tensor
    sample_bin: Tensor

    def to(self, device: torch.device) -> InputStatistics:
        """The same there."""
        return InputStatistics(*(part.to(device) for part in self.parts().values()))

    def parts(self) -> dict[str, Tensor]:
        """All tensors of it, by the names of `PARTS`."""
        return {part: getattr(self, part) for part in PARTS}

    @cached_property
    def second_moment(self) -> Tensor:
        """[B, C, C] or [1, C, C], the sums of x^T x themselves; of a changed input they are made at the first reading."""
        return self.moments if isinstance(self.moments, Tensor) else self.moments.whole()

    @property
    def width(self) -> int:
        """C, the number of channels."""
        return self.total.shape[1]

    @property
    def bins(self) -> int:
        """B, the number of timestep bins."""
        return self.count.shape[0]

    @property
    def by_bin(self) -> bool:
        """Is there a second moment for each bin?"""
        known = self.moments if isinstance(self.moments, Tensor) else self.moments.moments
        return len(known) == self.bins

    def hessian(self, weights: Tensor | None = None) -> Tensor:
        """[C, C]: E[x^T x] over all rows, half the Hessian of the layer's squared output error (GPTQ, Frantar 2022).

        weights: [B], how much a row of each bin counts, 0 or more; None for all the same. Only their ratios matter.

        Raises:
            ValueError: for weights of another shape, or of which none counts.
            DitqError: weights, but second moments that were summed over all bins.
        """
        if weights is not None and self.bins > 1 and not self.by_bin:
            raise DitqError(
                "these statistics hold second moments over all timesteps, so steps cannot be weighed; calibrate with "
                "--moments bins"
            )
        return self._average(self.second_moment, weights)

    def mean(self, weights: Tensor | None = None) -> Tensor:
        """[C]: E[x] over all rows; weights as in `hessian`."""
        return self._average(self.total, weights)

    def _average(self, sums: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return (sums[0] if len(sums) == 1 else sums.sum(0)) / self.count.sum()
        weights = weights.to(sums.dtype)
        rows = float((weights * self.count).sum()) if weights.shape == self.count.shape else 0.0
        if not (weights >= 0).all() or not 0 < rows < float("inf"):
            raise ValueError(f"{weights.tolist()} are no weights of {self.bins} bins: one each, 0 or more, not all 0")
        return torch.tensordot(weights, sums, 1) / rows

    def rms(self) -> float:
        """sqrt(mean x^2) over all rows and channels: the J of LRQ-DiT (arXiv 2508.03485, eq. 11)."""
        known = self.moments  # a rotation leaves the sum of the squares as it is
        squares = known.diagonal(dim1=1, dim2=2).double() if isinstance(known, Tensor) else known.squares()
        return float((squares.sum() / self.count.sum() / self.width).clamp_min(0).sqrt())

    @property
    def channel_rms(self) -> Tensor:
        """[C]: sqrt(E[x^2]) of every channel over all rows."""
        squares = self.second_moment.diagonal(dim1=1, dim2=2).sum(0)
        return (squares / self.count.sum()).clamp_min(0).sqrt()

    @property
    def absmax_all(self) -> Tensor:
        """[C]: max |x| of every channel over all rows."""
        return self.absmax.amax(0)

    @property
    def mean_crest(self) -> float:
        """Mean over all rows of max|x| / rms(x)."""
        return float((self.crest.double() * self.count).sum() / self.count.sum())

    def transformed(
        self,
        inverse_scale: Tensor | None = None,
        shift: Tensor | None = None,
        rotations: Sequence[tuple[int, int, Rotation]] = (),
    ) -> InputStatistics:
        """The statistics of x' = (x * inverse_scale - shift) R; R rotates the channels [start, stop) of each range.

        Counts, sums and second moments are exact (float64 inside, second_moments.py), the second moments made when they are
        read: t' = (t D - n s) R with D = diag(inverse_scale), s = shift. Of channels whose square is lost in the rounding of
        the sums, it is that of the sampled rows, and they go with no other channel. Crest factors are those of the sampled
        rows. So is absmax, unless x is only scaled; the largest value of all rows may be above that of the sample.
        """
        scale = torch.ones(self.width) if inverse_scale is None else inverse_scale
        scale = scale.double().cpu()
        offset = torch.zeros_like(scale) if shift is None else shift.double().cpu()
        if self.by_bin:
            seen, totals = self.count.tolist(), self.total.double()
        else:
            seen, totals = [int(self.count.sum())], self.total.double().sum(0, keepdim=True)
        total = torch.empty_like(self.total)
        for number, rows in enumerate(self.count.tolist()):
            total[number] = rotated(self.total[number].double() * scale - rows * offset, rotations)
        plain = self.sample.double() * scale - offset
        squares = torch.zeros(self.bins, self.width, dtype=torch.float64)
        for number in self.sample_bin.unique().tolist():
            squares[number] = plain[self.sample_bin == number].square().mean(0) * self.count[number]
        squares = squares if self.by_bin else squares.sum(0, keepdim=True)
        moments = ChangedMoments(self.second_moment, totals, seen, scale, offset, tuple(rotations), squares)
        sample = rotated(plain, rotations).float()
        absmax, crest = self.absmax * scale.abs().float(), torch.zeros_like(self.crest)
        only_scaled = shift is None and not rotations
        for number in range(self.bins):
            rows_of_bin = sample[self.sample_bin == number]
            if rows_of_bin.numel():
                crest[number] = crest_factors(rows_of_bin).mean()
                absmax[number] = absmax[number] if only_scaled else rows_of_bin.abs().amax(0)
        return InputStatistics(self.count, moments, total, absmax, crest, sample, self.sample_bin)
