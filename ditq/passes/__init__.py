"""The passes, one a file; each registers itself by name and nothing else knows the list."""

from __future__ import annotations

import importlib
import pkgutil

from ditq.passes.base import Context, Pass, PassReport, registered


def passes() -> dict[str, type[Pass]]:
    """All passes by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(registered().items()))


__all__ = ["Context", "Pass", "PassReport", "passes"]
