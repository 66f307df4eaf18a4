"""Several processes of one compile, as `accelerate launch` starts them: all train together, only the first one writes."""

from __future__ import annotations

import os


def count() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Is this the one that writes and prints?"""
    return int(os.environ.get("RANK", "0")) == 0
