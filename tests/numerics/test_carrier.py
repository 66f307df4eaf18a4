"""Carriers: a value goes to the nearest number of the grid, levels stay apart, and codebooks hold nothing but such numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.carrier import CARRIERS, FLOAT4, FLOAT8, INT8, Carrier, carrier_of
from ditq.numerics.codebook import CODEBOOKS, encode


def numbers(carrier: Carrier) -> Tensor:
    """All finite numbers by the definition of the format, ascending, float64."""
    if carrier is INT8:
        return torch.arange(-128, 128, dtype=torch.float64)
    if carrier is FLOAT4:
        exponents, mantissas = range(1, 4), range(2)
        positive = torch.tensor([0.5] + [2.0 ** (e - 1) * (1 + m / 2) for e in exponents for m in mantissas])
        return torch.cat((-positive.flip(0), torch.zeros(1), positive)).double()
    exponents, mantissas = range(1, 16), range(8)  # exponent 0 has no leading one; the last of all codes is no number
    normal = [2.0 ** (e - 7) * (1 + m / 8) for e in exponents for m in mantissas][:-1]
    positive = torch.tensor([2.0**-6 * m / 8 for m in range(1, 8)] + normal, dtype=torch.float64)
    return torch.cat((-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive))


@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
def test_a_carrier_has_the_numbers_of_its_format_and_each_has_a_place(carrier: Carrier) -> None:
    grid = carrier.grid()
    assert grid.dtype == carrier.dtype and len(grid) == 256 and carrier_of(grid) is carrier
    expected = numbers(carrier)
    assert torch.equal(grid.double().unique(), expected)
    assert torch.equal(carrier.place(expected).diff(), torch.ones(len(expected) - 1, dtype=torch.float64))
    assert torch.equal(carrier.value(carrier.place(expected)), expected)
    assert torch.equal(carrier.stored(expected).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("carrier", CARRIERS.values(), ids=CARRIERS)
def test_a_value_goes_to_the_nearest_number(carrier: Carrier, dtype: torch.dtype) -> None:
    size = 10 ** torch.linspace(-4, 2, 4000, dtype=torch.float64)
    values = (size * torch.randn(4000, generator=torch.Generator().manual_seed(0)).sign()).to(dtype)
    found = carrier.nearest(values)
    distances = (values.double()[:, None] - numbers(carrier)).abs().amin(1)
    assert found.dtype == dtype
    torch.testing.assert_close((found.double() - values.double()).abs(), distances, rtol=1e-6, atol=0)


def test_what_lies_beyond_the_largest_fp8_number_is_that_number() -> None:
    assert FLOAT8.nearest(torch.tensor([449.0, -1e9, 464.1])).tolist() == [448.0, -448.0, 448.0]


@pytest.mark.parametrize("carrier", [INT8, FLOAT8, FLOAT4], ids=lambda carrier: carrier.name)
def test_what_is_not_a_number_stays_that(carrier: Carrier) -> None:
    found = carrier.nearest(torch.tensor([torch.nan, -torch.nan, -1.0, 0.0]))
    assert found[:2].isnan().all() and found[2:].tolist() == [-1.0, 0.0]


def test_levels_that_would_fall_together_take_the_next_free_numbers() -> None:
    found = FLOAT8.distinct(torch.tensor([256.0, 260.0, 262.0, 448.0]), 448)
    assert found.tolist() == [256.0, 288.0, 320.0, 448.0]
    assert FLOAT8.distinct(torch.tensor([440.0, 445.0, 448.0]), 448).tolist() == [384.0, 416.0, 448.0]
    assert FLOAT8.distinct(torch.tensor([-448.0, -440.0, 0.0, 448.0]), 448, -448).tolist() == [
        -448.0,
        -416.0,
        0.0,
        448.0,
    ]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_codebook_has_fp8_levels_and_codes_the_nearest_of_them(name: str, bits: int) -> None:
    codebook = CODEBOOKS[name]
    if codebook.refusal(bits):
        return
    weight = torch.randn(12, 96, generator=torch.Generator().manual_seed(1)) * 0.1
    for group_size in (None, 32) if codebook.groups else (None,):
        for real_scales in (False, True) if group_size else (False,):
            settings = {"group_size": group_size, "float_group_scales": real_scales} if group_size else {}
            fit = codebook(weight, bits, carrier=FLOAT8, **settings)
            code = encode(weight, fit)
            carrier, levels = code.carrier(), fit.levels().double()
            assert fit.table.dtype == carrier.dtype == torch.float8_e4m3fn
            assert bool((fit.table.float().diff(dim=-1) >= 0).all()) and fit.table.shape[-1] == 2**bits
            groups = weight.double().unflatten(1, (fit.groups, -1))
            nearest = (groups[..., None] - levels[:, :, None]).abs().amin(-1)
            lost = (code.decode().double().unflatten(1, (fit.groups, -1)) - groups).abs()
            torch.testing.assert_close(lost, nearest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["twin_log_shared", "uniform", "lloyd_max"])
def test_four_bits_lose_little_more_on_fp8_than_on_int8(name: str) -> None:
    """Near the top FP8 numbers are an eighth of 256 apart: levels move by up to 16 of 448, a third of that in the mean."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    errors = [
        float((encode(weight, CODEBOOKS[name](weight, 4, carrier=carrier)).decode() - weight).square().sum())
        for carrier in (INT8, FLOAT8)
    ]
    assert errors[1] < 1.1 * errors[0]


def test_eight_bits_are_the_cast_to_fp8() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    fit = CODEBOOKS["uniform"](weight, 8, carrier=FLOAT8)
    expected = (weight / fit.scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float() * fit.scale[:, None]
    # a tie goes to the lower number in one and to the even one in the other: its distance is the same
    decoded = encode(weight, fit).decode()
    torch.testing.assert_close((decoded - weight).abs(), (expected - weight).abs(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("granularity", ["token", "group", "tensor"])
def test_inputs_on_the_fp8_grid_are_the_cast_by_token(granularity: str) -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-2, 2, 20)[:, None]
    size = {"group_size": 16} if granularity == "group" else {}
    form = ActivationFormat(8, granularity, "float8_e4m3", **size)  # type: ignore[arg-type]
    runs = {"token": x[:, None], "group": x.unflatten(1, (4, 16)), "tensor": x.flatten()[None, None]}[granularity]
    scale = runs.abs().amax(-1, keepdim=True) / 448
    expected = ((runs / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)
    found = form.rounded(x, form.scale(x.abs().max()) if granularity == "tensor" else None)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="FP8 activations have 8 bits"):
        ActivationFormat(4, "token", "float8_e4m3")
