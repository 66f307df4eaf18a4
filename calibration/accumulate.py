"""Running sums over the rows that one linear input gets: second moment, sum, extremes and a random sample, by bin."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024  # rows wait until there are about so many: one large product is quicker than many small ones
BAND = 256  # channels of a second moment that are computed together


class InputAccumulator:
    """Takes in rows [R, C] of one input, each call in one of B bins.

    Depends only on the rows, their order, and (seed, name): not on what other inputs got. Second moments are summed where the
    rows are, on `device`: a matrix for each bin, or one for all with `by_bin` false.
    """

    def __init__(
        self,
        name: str,
        width: int,
        bins: int,
        rows_per_bin: int,
        seed: int,
        by_bin: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.count = torch.zeros(bins, dtype=torch.int64)
        self.second_moment = torch.zeros(bins if by_bin else 1, width, width, device=device)
        self.total = torch.zeros(bins, width, dtype=torch.float64)
        self.absmax = torch.zeros(bins, width)
        self.crest = torch.zeros(bins, dtype=torch.float64)
        self.samples = [RowSample(width, rows_per_bin, _seed_of(seed, name, number)) for number in range(bins)]
        self._waiting: list[Tensor] = []
        self._waiting_bin = 0

    def add(self, rows: Tensor, number: int) -> bool:
        """Take in rows [R, C] for bin `number`; False, and nothing taken in, when a value is not finite."""
        if not rows.shape[0]:
            return True
        rows = rows.to(
            self.second_moment.device, torch.float32, copy=True
        )  # the model may go on to change its tensor in place
        if not rows.abs().max().isfinite():
            return False
        if number != self._waiting_bin or sum(part.shape[0] for part in self._waiting) >= ROWS_AT_ONCE:
            self._sum()
        self._waiting.append(rows)
        self._waiting_bin = number
        self.count[number] += rows.shape[0]
        return True

    def _sum(self) -> None:
        """Add up the rows that wait."""
        if not self._waiting:
            return
        rows, number = torch.cat(self._waiting), self._waiting_bin
        self._waiting = []
        moment = self.second_moment[number if len(self.second_moment) > 1 else 0]
        for start in range(0, rows.shape[1], BAND):  # the upper triangle in bands; the rest is its mirror image
            moment[start : start + BAND, start:].addmm_(rows[:, start : start + BAND].T, rows[:, start:])
        self.total[number] += rows.sum(0, dtype=torch.float64).cpu()
        torch.maximum(self.absmax[number], rows.abs().amax(0).cpu(), out=self.absmax[number])
        self.crest[number] += crest_factors(rows).sum(dtype=torch.float64).cpu()
        self.samples[number].add(rows)

    def tensors(self) -> dict[str, Tensor]:
        """What was gathered, by the names of the fields of InputStatistics."""
        self._sum()
        for moment in self.second_moment:
            moment.triu_().add_(moment.triu(1).mT)
        sizes = torch.tensor([sample.rows.shape[0] for sample in self.samples])
        return {
            "count": self.count,
            "moments": self.second_moment.cpu(),
            "total": self.total.float(),
            "absmax": self.absmax,
            "crest": (self.crest / self.count.clamp_min(1)).float(),
            "sample": torch.cat([sample.rows for sample in self.samples]),
            "sample_bin": torch.arange(len(self.samples)).repeat_interleave(sizes),
        }


class RowSample:
    """A uniform random sample of at most `size` of the rows seen, in the order in which they came.

    Every row draws a random key when it comes; the rows with the smallest keys stay. That is a reservoir sample without
    replacement (Efraimidis and Spirakis 2006, with equal weights), and it takes rows in any grouping.
    """

    def __init__(self, width: int, size: int, seed: int) -> None:
        self.rows = torch.empty(0, width)
        self._size = size
        self._keys = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, rows: Tensor) -> None:
        """See rows [R, C]."""
        keys = torch.rand(rows.shape[0], dtype=torch.float64, generator=self._generator)
        if self._keys.numel() == self._size:
            candidates = (keys < self._keys.max()).nonzero().flatten() if self._size else keys.new_empty(0).long()
            if not candidates.numel():
                return
            keys, rows = keys[candidates], rows[candidates.to(rows.device)]
        self._keys = torch.cat((self._keys, keys))
        self.rows = torch.cat((self.rows, rows.cpu()))
        if self._keys.numel() > self._size:
            staying = self._keys.topk(self._size, largest=False).indices.sort().values
            self._keys, self.rows = self._keys[staying], self.rows[staying]


def crest_factors(rows: Tensor) -> Tensor:
    """max|x| / rms(x) of every row of [R, C]: 1 for a flat row, sqrt(C) for a single spike; 1 for a row of zeros."""
    peak = rows.abs().amax(1)
    rms = (rows / peak.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]).square().mean(1).sqrt()
    return torch.where(peak > 0, 1 / rms.clamp_min(torch.finfo(rows.dtype).tiny), torch.ones_like(peak))


def _seed_of(seed: int, name: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
