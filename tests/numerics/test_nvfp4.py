"""NVFP4 against its definition, number by number in float64: weights and inputs in blocks of 16 with FP8 scales."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.carrier import FLOAT4
from ditq.numerics.codebook import CODEBOOKS, WeightCode, encode
from ditq.numerics.descent import refine
from ditq.numerics.rounding import output_error, round_gptq

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8 = [m * 2.0**-9 for m in range(8)] + [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8)][:-1]
FORM = ActivationFormat(4, "tensor", "float4_e2m1", group_size=16)


def next_of(numbers: list[float], value: float) -> float:
    """The nearest of the numbers, which have one sign, with the value's; halfway the one of even place."""
    gaps = [abs(abs(value) - number) for number in numbers]
    places = [place for place, gap in enumerate(gaps) if gap == min(gaps)]
    return math.copysign(numbers[min(places, key=lambda place: place % 2)], value)


def nvfp4(token: list[float], scale: float) -> list[float]:
    """The token after quantization, by the definition."""
    made = []
    for start in range(0, len(token), 16):
        block = [max(-2688.0, min(2688.0, x / scale)) for x in token[start : start + 16]]
        fp8 = next_of(FP8, max(map(abs, block)) / 6)
        made += [0.0 if fp8 == 0 else next_of(FP4, x / fp8) * fp8 * scale for x in block]
    return made


def test_inputs_are_those_of_the_definition() -> None:
    x = torch.randn(24, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.logspace(-7, 0, 24, dtype=torch.float64)[:, None]  # down to blocks of which nothing is left
    x[3, 5], x[7, :16] = 30.0, 0.0
    scale = torch.tensor(0.0013, dtype=torch.float64)
    expected = torch.tensor([nvfp4(token, float(scale)) for token in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(FORM.rounded(x, scale), expected, rtol=1e-12, atol=0)
    assert bool((expected == 0).all(1).any())


def test_ties_go_to_the_even_number() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -2.5, -5.0, 6.0, 0, 0, 0, 0])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -1.0, -2.0, -4.0, 6.0, 0, 0, 0, 0]
    assert FORM.rounded(x, torch.tensor(1.0)).tolist() == expected


def test_values_beyond_the_calibrated_largest_are_cut_off_there() -> None:
    scale = FORM.scale(torch.tensor(8.0))
    x = torch.full((16,), 100.0)
    torch.testing.assert_close(FORM.rounded(x, scale), torch.full((16,), 8.0))
    assert float(scale) == pytest.approx(8 / (448 * 6))


@pytest.mark.parametrize(("settings", "size"), [((8, "tensor"), 16), ((4, "token"), 16), ((4, "tensor"), 32)])
def test_other_bits_scales_and_blocks_are_refused(settings: tuple[int, str], size: int) -> None:
    with pytest.raises(ValueError, match="FP4 activations have 4 bits, a scale of the tensor and groups of 16"):
        ActivationFormat(*settings, "float4_e2m1", group_size=size)  # type: ignore[arg-type]


def weight(rows: int = 12, columns: int = 64) -> Tensor:
    found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.1
    found[2] *= 50
    found[4, :16] = 0
    found[5] = 0
    found[6, 3] = 4.0
    return found


def parts(code: WeightCode) -> tuple[Tensor, Tensor, Tensor]:
    """(FP4 numbers [O, G, 16], FP8 block scales [O, G], scales of the rows [O]), float64."""
    assert code.multiplier is not None
    return code.table[code.codes.long()].double().unflatten(1, (-1, 16)), code.multiplier.double(), code.scale.double()


@pytest.mark.parametrize("weighted", [False, True])
def test_weights_are_fp4_numbers_in_blocks_with_fp8_scales_that_lose_least(weighted: bool) -> None:
    """No FP8 number near the usual scale of a block, max|w| / 6, loses less; each weight takes its nearest level."""
    w = weight()
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else None
    counts = (torch.ones(64) if importance is None else importance).double().view(-1, 16)
    code = encode(w, CODEBOOKS["e2m1"](w, 4, importance=importance, group_size=16, carrier=FLOAT4))
    numbers, blocks, rows = parts(code)
    assert set(numbers.abs().unique().tolist()) <= set(FP4) and set(blocks.unique().tolist()) <= set(FP8)
    made = numbers * blocks[..., None] * rows[:, None, None]
    torch.testing.assert_close(code.decode().double(), made.flatten(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rows[:5], w[:5].double().abs().amax(1) / 2688, rtol=1e-6, atol=0)
    values = w.double().unflatten(1, (-1, 16))
    lost = ((made - values).square() * counts).sum(-1)
    signed = torch.tensor([-number for number in FP4] + FP4, dtype=torch.float64)
    for factor in (0.5, 2 / 3, 0.8, 0.9, 1.0, 1.1):
        wanted = (values.abs().amax(-1) / 6 / rows[:, None] * factor).tolist()
        tried = torch.tensor([[next_of(FP8, value) for value in row] for row in wanted], dtype=torch.float64)
        tried = tried.clamp_min(FP8[1])
        levels = signed * (tried * rows[:, None])[..., None]
        gaps = (values[..., None] - levels[:, :, None]).abs().amin(-1)
        # the search has steps of a twentieth: an FP8 number between two of them may be a little better
        assert bool((lost <= 1.02 * (gaps.square() * counts).sum(-1) + 1e-12).all())


def test_gptq_and_descent_lose_less_and_keep_the_format() -> None:
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(4)) @ torch.randn(64, 64).tril()
    hessian = x.T @ x / len(x)
    fit = CODEBOOKS["e2m1"](w, 4, group_size=16, carrier=FLOAT4)
    found = [encode(w, fit), round_gptq(w, hessian, fit)]
    found.append(refine(w, hessian, fit, found[1], 4))
    lost = [output_error(w, code.decode(), hessian) for code in found]
    assert lost[0] > lost[1] > lost[2]
    numbers, blocks, _ = parts(found[2])
    assert set(numbers.abs().unique().tolist()) <= set(FP4) and set(blocks.unique().tolist()) <= set(FP8)
    assert found[2].multiplier is not None and found[2].multiplier.dtype == torch.float8_e4m3fn


def test_fp4_numbers_without_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="FP4 numbers stand in blocks with a scale each; give a group_size"):
        CODEBOOKS["e2m1"](weight(), 4, carrier=FLOAT4)
