"""Several processes of one compile, as `accelerate launch` starts them: all train together, only the first one writes."""

from __future__ import annotations

import os
from typing import Any


def count() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Is this the one that writes and prints?"""
    return int(os.environ.get("RANK", "0")) == 0


def agreed(value: Any) -> Any:
    """The first process's value, which can be pickled, on all of them; all must ask for it."""
    if count() == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())  # as training sets it up
    return broadcast_object_list([value])[0]
