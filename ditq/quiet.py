"""Keep libraries from printing their own bars and notes into ditq's output."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it the two libraries print errors only; their settings are put back afterwards."""
    import diffusers
    import transformers

    both = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in both]
    try:
        for library in both:
            library.set_verbosity_error()
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, verbosity, bar in before:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Within it torch raises what a fake tensor operation refuses without also logging it, call stack and all."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def quiet_compiled_code() -> Iterator[None]:
    """Within it what compiled code prints to standard output goes nowhere, whatever Python calls standard output.

    Output of other threads meanwhile is lost as well.
    """
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    with suppress(AttributeError, ValueError):  # no stream, or one that is closed
        sys.stdout.flush()
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        with suppress(AttributeError, OSError, TypeError):  # where the C library is not the process's own
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(sink)
        os.close(kept)
