"""The codebooks, by name. Each is one file here with a fitter: weight [O, I] -> the levels that suit it (`Fit`).

To add a codebook, add a file with a function under `@codebook("name")`; nothing else lists them. Every fitter takes
`(weight, bits, importance=None, group_size=None, float_group_scales=False)` and settings of its own by keyword.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from ditq.numerics.weight_code import Fit

Fitter = Callable[..., Fit]
CODEBOOKS: dict[str, Fitter] = {}


def codebook(name: str) -> Callable[[Fitter], Fitter]:
    """Registers the decorated fitter as `CODEBOOKS[name]`."""

    def register(fitter: Fitter) -> Fitter:
        if name in CODEBOOKS:
            raise ValueError(f"there are two codebooks called {name!r}")
        CODEBOOKS[name] = fitter
        return fitter

    return register


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
