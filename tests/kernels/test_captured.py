"""Recorded calls: what they read is kept with them. That they replay is tested on a GPU."""

from __future__ import annotations

import gc
import weakref

import torch

from ditq.kernels.captured import hold, holding


class Mask:
    """Stands for what a cache may let go of."""


def test_what_is_held_while_a_call_is_recorded_lives_as_long_as_the_list() -> None:
    mask = Mask()
    seen = weakref.ref(mask)
    assert hold(Mask()) is not None  # nothing is being recorded, so nothing is kept
    with holding() as held:
        assert hold(mask) is mask
    del mask
    gc.collect()
    assert seen() is not None and len(held) == 1
    held.clear()
    gc.collect()
    assert seen() is None


def test_a_call_within_a_recorded_one_holds_for_itself() -> None:
    tensor = torch.zeros(1)
    with holding() as outer:
        with holding() as inner:
            hold(tensor)
        assert len(inner) == 1 and not outer
