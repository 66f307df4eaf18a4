"""ditq: a post-training quantization and compression compiler for Diffusion Transformers.

import ditq
ditq.compile("mini", "engine")
transformer = ditq.load_engine("engine")
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ditq.errors import DitqError

if TYPE_CHECKING:
    from ditq.calibration.calibrate import calibrate
    from ditq.checkpoint import Checkpoint
    from ditq.compiler import CompileOptions, compile
    from ditq.export.loader import load_engine
    from ditq.graph import DiTGraph
    from ditq.recipe import Recipe, load_recipe
    from ditq.report.evaluate import evaluate

try:
    __version__ = version("ditq")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+source"

_PLACES = {
    "Checkpoint": "ditq.checkpoint",
    "CompileOptions": "ditq.compiler",
    "DiTGraph": "ditq.graph",
    "Recipe": "ditq.recipe",
    "calibrate": "ditq.calibration.calibrate",
    "compile": "ditq.compiler",
    "evaluate": "ditq.report.evaluate",
    "load_engine": "ditq.export.loader",
    "load_recipe": "ditq.recipe",
}

__all__ = [
    "Checkpoint",
    "CompileOptions",
    "DiTGraph",
    "DitqError",
    "Recipe",
    "__version__",
    "calibrate",
    "compile",
    "evaluate",
    "load_engine",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    """Import parts when they are first asked for: torch and diffusers take seconds that `ditq --help` need not."""
    if name not in _PLACES:
        raise AttributeError(f"module 'ditq' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
