"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: queries and keys in one pass against their meaning in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.kernels.heads import heads_meaning, launch, signs_of_heads
from ditq.numerics.carrier import E4M3
from tests.kernels import interpreter

interpreter.install()


def given(counts: list[int], heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Pieces of so many tokens, as q, k and v of one product lie: a third of each row of memory."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(2, count, 3 * heads * width, generator=generator).to(dtype) for count in counts)
    return [row[..., : heads * width].unflatten(-1, (heads, width)) for row in rows]


@pytest.mark.parametrize("width", [16, 72, 128])
@pytest.mark.parametrize("parts", ["norm weight rotary", "norm", "rotary", "norm weight", ""])
@pytest.mark.parametrize("rounded", ["", "FP8", "FP8 rotated"], ids=str)
def test_it_is_its_meaning(width: int, parts: str, rounded: str) -> None:
    """Two pieces, tokens and heads that no program divides, every output NaN before."""
    generator = torch.Generator().manual_seed(1)
    pieces = given([5, 18], 5, width, torch.bfloat16)
    weights = [torch.rand(width, generator=generator) + 0.5 for _ in pieces] if "weight" in parts else []
    angles = torch.rand(23, width, generator=generator) * 6  # the two of a pair differ, which the formula allows
    tables = (angles.cos(), angles.sin()) if "rotary" in parts else (None, None)
    epsilon = 1e-3 if "norm" in parts else -1.0
    factor = torch.tensor([200.0]) if rounded else None  # some are clipped
    y = torch.full((2, 23, 5, width), torch.nan, dtype=E4M3 if rounded else torch.float32)
    rotation = signs_of_heads(width, torch.device("cpu")) if "rotated" in rounded else None
    launch(pieces, weights, epsilon, *tables, factor, rotation, y)
    expected = heads_meaning(pieces, weights, epsilon, *tables, factor, rotation)
    if rounded:
        assert float(expected.abs().max()) == 448
        near = expected.float().to(E4M3)
        # All but ties, of which a rotation has more: it reads what was rounded to bfloat16.
        assert float((y.float() == near.float()).double().mean()) > (0.99 if rotation else 0.999)
    else:
        assert float((y.double() - expected).norm() / expected.norm()) < 1e-6
