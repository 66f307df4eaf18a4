"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: queries, keys and values in one pass against their meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.kernels.heads import NORM, ROTARY, ROTATED, WEIGHT, Part, heads, heads_meaning, launch
from ditq.numerics.carrier import E4M3
from tests.kernels import interpreter

interpreter.install()
STEPS = {"": 0, "norm": NORM, "weight": NORM | WEIGHT, "rotary": ROTARY, "all": NORM | WEIGHT | ROTARY}


def given(counts: list[int], heads: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[list[Tensor]]:
    """Three parts in pieces of so many tokens, as q, k and v of one product lie: a third of each row of memory."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, count, 3 * heads * width, generator=generator).to(dtype) for count in counts]
    return [[row.chunk(3, -1)[part].unflatten(-1, (heads, width)) for row in rows] for part in range(3)]


def part(pieces: list[Tensor], steps: int, seed: int = 1) -> Part:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.rand(pieces[0].shape[-1], generator=generator) + 0.5 for _ in pieces] if steps & WEIGHT else []
    return Part(pieces, steps, weights, 1e-3 if steps & NORM else 0.0)


def tables(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """The two angles of a pair differ, which the formula allows."""
    angles = torch.rand(tokens, width, generator=torch.Generator().manual_seed(2)) * 6
    return angles.cos(), angles.sin()


def check(y: Tensor, expected: Tensor, turned: bool) -> None:
    """y in FP8 is the number next to what is expected, but for ties, of which a rotation has more: it reads what was rounded
    to bfloat16. In float32 it is that itself."""
    if y.dtype == E4M3:
        near = expected.float().to(E4M3)
        assert float((y.float() == near.float()).double().mean()) > (0.99 if turned else 0.999)
    else:
        assert float((y.double() - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("width", [16, 72, 128])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rounded", ["", "FP8", "FP8 rotated"], ids=str)
def test_it_is_its_meaning(width: int, steps: str, rounded: str) -> None:
    """Two pieces, tokens and heads that no program divides, every output NaN before."""
    turned = "rotated" in rounded
    made = part(given([5, 66], 9, width)[0], STEPS[steps] | (ROTATED if turned else 0))
    cos_sin = tables(71, width) if made.steps & ROTARY else (None, None)
    factors = torch.tensor([200.0]) if rounded else None  # some are clipped
    y = torch.full((2, 71, 9, width), torch.nan, dtype=E4M3 if rounded else torch.float32)
    launch([made], *cos_sin, factors, [y])
    expected = heads_meaning(made, *cos_sin, None if factors is None else factors[0])
    assert not rounded or float(expected.abs().max()) == 448
    check(y, expected, turned)


@pytest.mark.parametrize(
    "steps",
    [
        ("all", "all", ""),
        ("all", "all", "all"),
        ("norm", "rotary", ""),
        ("weight", "", "norm"),
        ("all", "rotary"),
        ("all", "all"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("rounded", [False, True])
def test_parts_that_lie_alike_are_made_by_one_launch(steps: tuple[str, ...], rounded: bool) -> None:
    """Each as it would be by itself, whatever is done to the others; a part's factor and weights are its own."""
    turned = (rounded, rounded, False)
    lie = given([5, 66], 9, 32)
    parts = [
        part(pieces, STEPS[name] | (ROTATED if on else 0), seed)
        for seed, (pieces, name, on) in enumerate(zip(lie, steps, turned, strict=False))
    ]
    cos_sin = tables(71, 32)
    factors = torch.tensor([60.0, 90.0, 140.0])[: len(parts)] if rounded else None
    y = [torch.full((2, 71, 9, 32), torch.nan, dtype=E4M3 if rounded else torch.float32) for _ in parts]
    launch(parts, *cos_sin, factors, y)
    for number, made in enumerate(parts):
        check(y[number], heads_meaning(made, *cos_sin, None if factors is None else factors[number]), turned[number])


def test_parts_that_do_not_lie_alike_are_made_all_the_same() -> None:
    """Fewer heads of keys, another epsilon of theirs, values that lie by themselves; as the operator is called."""
    q, k, v = (pieces[0] for pieces in given([70], 4, 32))
    pieces, weight = [q, k[:, :, :2], v.contiguous()], torch.full((32,), 1.5)
    counts, steps = [1, 1, 1], [NORM | WEIGHT, NORM | WEIGHT, 0]
    found = heads(pieces, counts, steps, [weight, 2 * weight], [1e-6, 1e-1, 0.0], None, None, None)
    for y, made in zip(
        found,
        (Part([q], steps[0], [weight], 1e-6), Part([pieces[1]], steps[1], [2 * weight], 1e-1), Part([v], 0)),
        strict=True,
    ):
        expected = heads_meaning(made, None, None, None)
        assert y.dtype == torch.bfloat16 and y.shape == expected.shape
        assert float((y.double() - expected).norm() / expected.norm()) < 3e-3
