"""Rounded attention is what its formulas say: against float64 by loops, exact where it says so, and within half a step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.attention_rounding import (
    FORMATS,
    AttentionFormat,
    nearest,
    rotation_of_heads,
    rounded_attention,
    spacing,
    turned,
)

FLOAT8_NUMBERS = sorted(
    {0.0}
    | {m / 8 * 2.0**-6 for m in range(1, 8)}  # below the smallest exponent
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)  # fmt: skip
PARTS = ["".join(letters) for count in (1, 2, 3, 4) for letters in itertools.combinations("qkvp", count)]
PARTS += ["vo", "qkvpo"]
STATIC = (0.01, 0.04, 0.002)  # that of the values is too small for some


def inputs(dtype: torch.dtype = torch.float64, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """5 queries, 7 keys; the keys share a large offset."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, width, generator=generator, dtype=dtype) for n in (5, 7, 7))
    return query, key + 8 * torch.randn(2, 3, 1, width, generator=generator, dtype=dtype), value


def number_nearest(x: float, number: str) -> float:
    """By looking at all of them; ties to the even one."""
    known = [float(n) for n in range(256)] if number == "int8" else FLOAT8_NUMBERS
    distance = min(abs(abs(x) - n) for n in known)
    near = [n for n in range(len(known)) if abs(abs(x) - known[n]) == distance]
    return math.copysign(known[next(n for n in near if n % 2 == 0) if len(near) > 1 else near[0]], x)


def by_loops(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: AttentionFormat) -> Tensor:
    """The same a number at a time: a scale for each query, key and channel of the values, or one for all of each."""
    largest = 127 if form.number == "int8" else 448

    def in_scale(x: float, s: float) -> float:
        return number_nearest(max(-largest, min(largest, x / s)), form.number) * s

    def rounded(vector: list[float], part: int) -> list[float]:
        s = form.scales[part] if form.scales else max(abs(x) for x in vector) / largest
        return [in_scale(x, s) for x in vector]

    result = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
        q, k, v = (x[b, h].tolist() for x in (query, key, value))
        if "k" in form.parts and form.smooth_keys:
            means = [sum(column) / len(k) for column in zip(*k, strict=True)]
            k = [[x - mean for x, mean in zip(row, means, strict=True)] for row in k]
        q = [rounded(row, 0) for row in q] if "q" in form.parts else q
        k = [rounded(row, 1) for row in k] if "k" in form.parts else k
        columns = [list(column) for column in zip(*v, strict=True)]
        scales = [form.scales[2] if form.scales else max(map(abs, column)) / largest for column in columns]
        columns = [rounded(column, 2) for column in columns] if "v" in form.parts else columns
        for i, row in enumerate(q):
            scores = [sum(x * y for x, y in zip(row, other, strict=True)) / math.sqrt(len(row)) for other in k]
            if mask is not None:
                scores = [score + float(mask[b, 0, 0, j]) for j, score in enumerate(scores)]
            p = [math.exp(score - max(scores)) for score in scores]
            total, last = sum(p), 255 if form.number == "int8" else 448
            if "p" in form.parts:
                p = [number_nearest(x * last, form.number) / last for x in p]
            for c, column in enumerate(columns):
                y = sum(x * y for x, y in zip(p, column, strict=True)) / total
                result[b, h, i, c] = in_scale(y, scales[c]) if "o" in form.parts else y
    return result


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize("parts", PARTS)
def test_every_choice_of_parts_is_the_formula(parts: str, number: str) -> None:
    query, key, value = inputs()
    mask = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    mask[0, ..., 5:] = -10000.0
    scales = STATIC if number == "float8_e4m3" else ()
    for smooth, bias, static in ((True, mask, ()), (False, None, ()), (False, mask, scales)):
        form = AttentionFormat(number, parts, smooth, static)
        found = rounded_attention(query, key, value, bias, 6**-0.5, form)
        # float64 on both sides; float8 is reached through float32, where half a unit in the last place may turn a tie
        # the step of probabilities is that of float32
        near = 1e-6 if "p" in parts else 1e-9
        torch.testing.assert_close(found, by_loops(query, key, value, bias, form), rtol=near, atol=near)


@pytest.mark.parametrize("number", FORMATS)
def test_rounding_takes_the_nearest_number_and_knows_how_far_apart_they_are(number: str) -> None:
    steps = torch.cat(
        (torch.linspace(-127, 127, 999), torch.logspace(-4, 2, 200), torch.tensor([0.0, 0.5, 1.5, 127.0]))
    )
    found = nearest(steps, number)
    assert found.tolist() == [number_nearest(x, number) for x in steps.tolist()]
    assert ((found - steps).abs() <= spacing(steps, number) / 2).all()
    assert torch.equal(nearest(found, number), found)


def test_smoothing_keys_changes_nothing_but_the_rounding() -> None:
    """The scores of a query all move by the same number. What rounding loses of keys with an offset it wins back."""
    query, key, value = inputs()
    exact = F.scaled_dot_product_attention(query, key, value)
    smooth = F.scaled_dot_product_attention(query, key - key.mean(-2, keepdim=True), value)
    torch.testing.assert_close(smooth, exact, rtol=1e-12, atol=1e-12)
    plain, better = (
        rounded_attention(query, key, value, None, 6**-0.5, AttentionFormat("int8", "k", on)) for on in (False, True)
    )
    assert (better - exact).norm() < 0.5 * (plain - exact).norm()


def test_rotation_changes_nothing_but_the_rounding_and_helps_where_few_channels_are_large() -> None:
    query, key, value = inputs(width=48)
    exact = F.scaled_dot_product_attention(query, key, value)
    turned_scores = F.scaled_dot_product_attention(turned(query), turned(key), value)
    torch.testing.assert_close(turned_scores, exact, rtol=1e-12, atol=1e-12)
    assert float(rotation_of_heads(48).abs().max()) == pytest.approx(16**-0.5)  # blocks of 16
    assert torch.equal(rotation_of_heads(5), torch.eye(5))
    large = torch.where(torch.arange(48) % 16 == 3, 8.0, 1.0)
    query, key = query * large, (key - key.mean(-2, keepdim=True)) * large / 40  # scores of a softmax that is not sharp
    exact = F.scaled_dot_product_attention(query, key, value)
    for number in FORMATS:
        plain, better = (
            rounded_attention(query, key, value, None, 48**-0.5, AttentionFormat(number, "qk", False, (), on))
            for on in (False, True)
        )
        assert (better - exact).norm() < 0.7 * (plain - exact).norm()
    form = AttentionFormat("int8", "v", rotate=True)  # neither is rounded, so neither is rotated
    assert torch.equal(
        rounded_attention(query, key, value, None, 0.1, form),
        rounded_attention(query, key, value, None, 0.1, AttentionFormat("int8", "v")),
    )


def test_probabilities_of_many_tokens_are_not_rounded_away() -> None:
    """1,024 keys that are nearly alike: each probability is a thousandth, less than half of 1/255."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 1024, 16, generator=generator) for _ in range(3))
    key, value = 0.3 * key, value + 1
    exact = F.scaled_dot_product_attention(query, key, value)
    found = rounded_attention(query, key, value, None, 0.25, AttentionFormat("int8", "p"))
    assert (found - exact).norm() / exact.norm() < 1 / 255


def test_a_mask_of_true_and_false_hides_keys() -> None:
    query, key, value = inputs()
    seen = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    seen[..., 4:] = False
    form = AttentionFormat("int8", "qvp")
    hidden = rounded_attention(query, key, value, torch.where(seen, 0.0, -torch.inf), 6**-0.5, form)
    assert torch.equal(rounded_attention(query, key, value, seen, 6**-0.5, form), hidden)


def test_gradients_pass_straight_through_the_roundings() -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 9, 8, generator=generator, requires_grad=True) for _ in range(3)]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*given).square().sum(), given)
    y = rounded_attention(*given, None, 8**-0.5, AttentionFormat())
    for found, expected in zip(torch.autograd.grad(y.square().sum(), given), wanted, strict=True):
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_half_precision_comes_out_as_it_came_in() -> None:
    query, key, value = (x.bfloat16() for x in inputs(torch.float32))
    found = rounded_attention(query, key, value, None, 6**-0.5, AttentionFormat())
    expected = rounded_attention(query.float(), key.float(), value.float(), None, 6**-0.5, AttentionFormat())
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize(("number", "parts"), [("int4", "q"), ("int8", "qx"), ("int8", ""), ("int8", "qq")])
def test_other_formats_are_refused(number: str, parts: str) -> None:
    with pytest.raises(ValueError, match="attention"):
        AttentionFormat(number, parts)
