"""Arguments of every nesting are taken apart, put together again, and checked against what an engine was compiled with."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ditq.errors import DitqError
from ditq.export.arguments import collect, flatten, unflatten

ONE, TWO = torch.ones(2), torch.zeros(3)
GIVEN: dict[str, Any] = {
    "x": ONE,
    "rotary": (ONE, TWO),
    "samples": [TWO, [ONE]],
    "shapes": [[(1, 8, 8)], [(1, 8, 8)]],
    "scale": (0.5, 32),
    "more": {"size": TWO, "none": None},
    "flag": True,
}


def test_what_is_taken_apart_is_put_together_again() -> None:
    tensors, layout = flatten(GIVEN)
    assert list(tensors) == ["x", "rotary.0", "rotary.1", "samples.0", "samples.1.0", "more.size"]
    assert str(unflatten(tensors, json.loads(json.dumps(layout)))) == str(GIVEN)


def test_a_call_is_checked_against_what_was_compiled() -> None:
    tensors, layout = flatten(GIVEN)
    assert list(collect(GIVEN, layout, "engine")) == list(tensors)
    more_samples = {**GIVEN, "shapes": [[(1, 8, 8)]] * 5}
    assert list(collect(more_samples, layout, "engine")) == list(tensors)
    for name, value, says in (
        ("shapes", [[(1, 8, 8)], [(1, 4, 8)]], r"compiled with 'shapes.1.0.1' = 8; it cannot take another value"),
        ("flag", torch.ones(2), "compiled with 'flag' = True; it cannot take another value"),
        ("scale", (0.5, torch.ones(4, 4)), "compiled with 'scale.1' = 32; it cannot take another value"),
        ("rotary", (ONE,), "argument 'rotary' must be a list of 2 values"),
        ("rotary", None, "argument 'rotary' must be a list of 2 values"),
        ("shapes", 3, "argument 'shapes' must be a list, as"),
        ("samples", [TWO, [1]], "argument 'samples.1.0' must be a tensor, not int"),
        ("scale", (0.5, 16), "compiled with 'scale.1' = 32"),
        ("other", TWO, "compiled without 'other'"),
    ):
        with pytest.raises(DitqError, match=says):
            collect({**GIVEN, name: value}, layout, "engine")


def test_what_no_engine_can_take_is_named() -> None:
    with pytest.raises(DitqError, match=r"argument a\.1: a set cannot be exported"):
        flatten({"a": [1, {2}]})
