"""Attention is computed in portions that stay in the caches, and its answers are those of one portion."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditq.numerics import portions as module
from ditq.numerics.linear_attention import LinearForm, linear_attention
from ditq.numerics.local_attention import local_attention
from ditq.numerics.portions import portions
from ditq.numerics.sparse_attention import sparse_attention
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Window
from tests.numerics.test_local_attention import tensors

GRID = Grid(5, 9, 10)  # no whole number of tiles
EYE = torch.eye(16).expand(3, 16, 16)
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": lambda q, k, v: local_attention(q, k, v, GRID, Window("circle", 3, 2), 0.25),
    "tiles": lambda q, k, v: local_attention(q, k, v, GRID, Window("tiles", 3, 2), 0.25),
    "chosen tiles": lambda q, k, v: sparse_attention(q, k, v, GRID, 0.25, tile=2, keep=4),
    "chosen tiles and means": lambda q, k, v: sparse_attention(q, k, v, GRID, 0.25, tile=2, keep=4, means=True),
    "linear": lambda q, k, v: linear_attention(q, k, v, GRID, 0.25, LinearForm("relu", EYE, EYE, gain=torch.zeros(3))),
}


@pytest.mark.parametrize("form", FORMS)
def test_many_portions_answer_as_one(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors(GRID)
    whole = FORMS[form](query, key, value)  # gradients may be wanted: one portion
    cut: list[int] = []

    def counted(tensor: Tensor, count: int, elements: int) -> list[slice]:
        found = portions(tensor, count, elements)
        cut.append(len(found))
        return found

    for name in ("local_attention", "sparse_attention", "linear_attention"):
        monkeypatch.setattr(f"ditq.numerics.{name}.portions", counted)
    monkeypatch.setattr(module, "CACHED", 2**14)
    with torch.no_grad():
        found = FORMS[form](query, key, value)
    assert max(cut) > 2
    assert (found - whole).abs().max() < 1e-6


def test_portions_are_all_of_it_once() -> None:
    tensor = torch.zeros(1)
    with torch.no_grad():
        found = portions(tensor, 10, module.CACHED // 12)  # three of four bytes each at a time
        assert found == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)]
        assert portions(tensor, 2, module.CACHED) == [slice(0, 1), slice(1, 2)]  # one at least
        assert portions(tensor, 0, 1) == []
    assert portions(tensor, 10, module.CACHED) == [slice(0, 10)]  # gradients keep all of it
