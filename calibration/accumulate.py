"""Running sums over the rows that one linear input gets: second moment, sum, extremes and a random sample, by bin."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class InputAccumulator:
    """Takes in rows [R, C] of one input, each call in one of B bins.

    Depends only on the rows, their order, and (seed, name): not on what other inputs got.
    """

    def __init__(self, name: str, width: int, bins: int, rows_per_bin: int, seed: int) -> None:
        self.count = torch.zeros(bins, dtype=torch.int64)
        self.second_moment = torch.zeros(bins, width, width)
        self.total = torch.zeros(bins, width, dtype=torch.float64)
        self.absmax = torch.zeros(bins, width)
        self.crest = torch.zeros(bins, dtype=torch.float64)
        self.samples = [RowSample(width, rows_per_bin, _seed_of(seed, name, number)) for number in range(bins)]

    def add(self, rows: Tensor, number: int) -> bool:
        """Take in float32 rows [R, C] for bin `number`; False, and nothing taken in, when one is not finite."""
        if not rows.shape[0]:
            return True
        absmax = rows.abs().amax(0)
        if not absmax.isfinite().all():
            return False
        self.count[number] += rows.shape[0]
        if rows.is_cpu:
            self.second_moment[number].addmm_(rows.T, rows)
        else:
            self.second_moment[number] += (rows.T @ rows).cpu()
        self.total[number] += rows.sum(0, dtype=torch.float64).cpu()
        torch.maximum(self.absmax[number], absmax.cpu(), out=self.absmax[number])
        self.crest[number] += crest_factors(rows).sum(dtype=torch.float64).cpu()
        self.samples[number].add(rows)
        return True

    def tensors(self) -> dict[str, Tensor]:
        """What was gathered, by the names of the fields of InputStatistics."""
        sizes = torch.tensor([sample.rows.shape[0] for sample in self.samples])
        return {
            "count": self.count,
            "second_moment": self.second_moment,
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
