"""Which NVIDIA GPU this machine has, as torch sees it."""

from __future__ import annotations

import torch

from ditq.errors import DitqError
from ditq.export.session import first_line


def gpu_of(least: int, what: str) -> str:
    """The kind of this machine's GPU, such as `sm89`.

    Args:
        least: the kind from which on it will do, such as 80.
        what: what needs that, for the message.

    Raises:
        DitqError: there is none, torch cannot use it, or it is below; one line with what to do.
    """
    if torch.version.cuda is None:
        raise DitqError(f"torch {torch.__version__} is a build without CUDA; install one with CUDA")
    try:
        torch.cuda.init()
        major, minor = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        raise DitqError(f"no GPU that torch can use: {first_line(error)}") from error
    if 10 * major + minor < least:
        name = torch.cuda.get_device_name()
        raise DitqError(f"{name} is sm{major}{minor}; {what} sm{least} or newer")
    return f"sm{major}{minor}"
