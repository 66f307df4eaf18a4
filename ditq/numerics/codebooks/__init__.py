"""The codebooks, by name. Each is one file here with a fitter: weight [O, I] -> the levels that suit it (`Fit`).

To add a codebook, add a file with a function under `@codebook("name")`; nothing else lists them. Every fitter takes
`(weight, bits, importance=None, group_size=None, float_group_scales=False, carrier=INT8)` and settings of its own by
keyword.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditq.numerics.weight_code import Fit

UNSEEN = 1e-6  # of the mean importance: what a column counts whose input calibration never saw other than zero

Fitter = Callable[..., Fit]


@dataclass(frozen=True)
class Codebook:
    """A fitter and what it takes: the bits that it has levels for, and whether groups of columns may have scales."""

    name: str
    fit: Fitter
    bits: tuple[int, ...]
    groups: bool

    def refusal(self, bits: int, group_size: int | None = None) -> str | None:
        """Why the fitter takes no such bits or group size; None where it takes them."""
        if bits not in self.bits:
            return f"the codebook {self.name!r} is for weights of {' or '.join(map(str, self.bits))} bits, not {bits}"
        if group_size and not self.groups:
            return f"the codebook {self.name!r} has a table a row and takes no group_size; 'twin_log_shared' takes one"
        return None

    def __call__(self, weight: Tensor, bits: int, **settings: Any) -> Fit:
        """The fit of a weight [O, I]; raises ValueError for what the fitter does not take."""
        if (importance := settings.get("importance")) is not None:
            settings["importance"] = counted(importance)
        return self.fit(weight, bits, **settings)


def counted(importance: Tensor) -> Tensor:
    """importance [I] with a little for columns that have none; equal for all where none has any.

    Their inputs were zero in calibration, which does not say that they always are. Counted for nothing, a group of such columns
    would take the first scale that is tried, and lose 40 % of its weights.
    """
    seen = importance > 0
    mean = torch.where(seen, importance, 0).sum() / seen.sum().clamp_min(1)
    least = torch.where(seen.any(), (UNSEEN * mean).clamp_min(torch.finfo(importance.dtype).tiny), 1)
    return torch.where(seen, importance, least.to(importance.dtype))


CODEBOOKS: dict[str, Codebook] = {}


def codebook(name: str, bits: tuple[int, ...] = tuple(range(2, 9)), groups: bool = True) -> Callable[[Fitter], Fitter]:
    """Registers the decorated fitter as `CODEBOOKS[name]`; `bits` and `groups` say what it takes."""

    def register(fitter: Fitter) -> Fitter:
        if name in CODEBOOKS:
            raise ValueError(f"there are two codebooks called {name!r}")
        CODEBOOKS[name] = Codebook(name, fitter, bits, groups)
        return fitter

    return register


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
