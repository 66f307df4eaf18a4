"""Which TensorRT is here, and which GPU. TensorRT and TensorRT for RTX have one interface, so all else is the same for both."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ditq.errors import DitqError
from ditq.export.gpu import gpu_of

RTX, PROPER = "tensorrt_rtx", "tensorrt"
SMALLEST = 80  # Ampere, the first with bfloat16 and asynchronous copies; plans are built and proven from there on
FIRST = {"float8": 89, "float4": 100}  # kinds of numbers that not all multiply; FP4 from Blackwell on


@dataclass(frozen=True)
class Library:
    """A TensorRT that can be imported. name: of its module; version: its own."""

    name: str
    version: str
    module: Any

    def __str__(self) -> str:
        return f"{'TensorRT for RTX' if self.name == RTX else 'TensorRT'} {self.version}"

    @property
    def folder(self) -> str:
        """Where an engine keeps its plans of this library and version."""
        return f"{self.name}-{self.version}"

    def gpus(self) -> list[str]:
        """Kinds of GPU, such as `sm89`, that it builds plans for where there is none; empty if it wants the GPU itself."""
        known = getattr(self.module, "ComputeCapability", None)
        names = [] if known is None else [name for name in known.__members__ if name.startswith("SM")]
        return sorted((name.lower() for name in names if int(name[2:]) >= SMALLEST), key=lambda name: int(name[2:]))

    def logger(self, keep: Callable[[str, str], None]) -> Any:
        """A logger of the library that hands (severity, message) to `keep`."""

        class Logger(self.module.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, message: str) -> None:
                keep(severity.name, message)

        return Logger()


def libraries() -> list[Library]:
    """Those that can be imported, TensorRT for RTX first: it alone builds plans ahead of time."""
    found = []
    for name in (RTX, PROPER):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):
            continue
        if hasattr(module, "Builder"):
            found.append(Library(name, str(module.__version__), module))
    return found


def library_for(gpu: str) -> Library:
    """The library that builds plans for this kind of GPU.

    Raises:
        DitqError: there is none, or it does not know this GPU.
    """
    known = libraries()
    if not known:
        raise DitqError("no TensorRT is installed; pip install tensorrt-rtx-cu13, or tensorrt")
    for library in known:
        if gpu in library.gpus() or (library.name == PROPER and gpu == _gpu_or_none()):
            return library
    kinds = ", ".join(dict.fromkeys(kind for library in known for kind in library.gpus())) or "the GPU of this machine"
    raise DitqError(
        f"gpu {gpu}: {known[0]} builds plans for {kinds}; for others install tensorrt on a machine with one"
    )


def present_gpu() -> str:
    """The kind of this machine's GPU, such as `sm89`.

    Raises:
        DitqError: there is none, or torch cannot use it; one line with what to do.
    """
    return gpu_of(SMALLEST, "TensorRT plans need")


def _gpu_or_none() -> str | None:
    try:
        return present_gpu()
    except DitqError:
        return None
