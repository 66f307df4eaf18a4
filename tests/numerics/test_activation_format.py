"""Activation formats: every value goes to the nearest level of its grid, and the clip factor is that of least error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.numerics.activation_clip import CLIPS, best_clip, column_energy, input_error
from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.uniform import quantize_per_token


def rows(count: int = 40, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 3, count, dtype=torch.float64)[:, None]
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * spread


def levels(form: ActivationFormat) -> Tensor:
    """Every level of the format, in units of c max|x|."""
    if form.grid == "midrise":
        cells = 2**form.bits
        return (torch.arange(cells, dtype=torch.float64) + 0.5) / (cells / 2) - 1
    top = 2 ** (form.bits - 1) - 1
    return torch.arange(-top, top + 1, dtype=torch.float64) / top


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("grid", ["symmetric", "midrise"])
@pytest.mark.parametrize("bits", [2, 4, 6, 7])
def test_a_token_goes_to_the_nearest_of_its_levels(bits: int, grid: str, clip: float) -> None:
    form, x = ActivationFormat(bits, "token", grid, clip), rows()  # type: ignore[arg-type]
    reach = clip * x.abs().amax(1, keepdim=True)
    distances = (x[..., None] - reach[..., None] * levels(form)).abs()
    found = (form.rounded(x) - x).abs()
    torch.testing.assert_close(found, distances.amin(-1), rtol=1e-12, atol=1e-12 * float(reach.max()))


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_midrise_grid_uses_every_code_as_an_odd_number_that_int8_holds(bits: int) -> None:
    x = torch.linspace(-1, 1, 4001)[None]
    q, step = ActivationFormat(bits, "token", "midrise").quantize(x)
    assert q.unique().tolist() == list(range(1 - 2**bits, 2**bits, 2))
    assert step.shape == (1, 1) and bool((q.abs() <= 127).all())


def test_the_plain_format_is_quantization_per_token() -> None:
    x = rows().float()
    q, step = ActivationFormat(8, "token").quantize(x)
    expected, scale = quantize_per_token(x, 8)
    assert torch.equal(q, expected) and torch.equal(step, scale)


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_unsigned_token_goes_to_the_nearest_of_its_levels(bits: int, clip: float) -> None:
    x = torch.nn.functional.gelu(rows().abs().log())  # from -0.17 up
    form = ActivationFormat(bits, "token", "unsigned", clip, shift=0.17)
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    reach = clip * (x.amax(1, keepdim=True) + 0.17)
    distances = (x[..., None] + 0.17 - reach[..., None] * levels).abs()
    torch.testing.assert_close((form.rounded(x) - x).abs(), distances.amin(-1), rtol=1e-12, atol=1e-12)
    assert form.quantize(x)[0].min() >= 0


@pytest.mark.parametrize("grid", ["symmetric", "midrise"])
@pytest.mark.parametrize(("bits", "clip"), [(4, 1.0), (4, 0.7), (7, 1.0)])
def test_with_a_scale_a_group_each_group_is_a_token_of_its_own(bits: int, clip: float, grid: str) -> None:
    x = rows() * torch.logspace(-2, 2, 64, dtype=torch.float64)  # groups of very different sizes
    form = ActivationFormat(bits, "group", grid, clip, group_size=16)  # type: ignore[arg-type]
    alone = ActivationFormat(bits, "token", grid, clip)  # type: ignore[arg-type]
    found, unit = form.quantize(x)
    for group in range(4):
        part = slice(16 * group, 16 * (group + 1))
        expected, scale = alone.quantize(x[:, part])
        assert torch.equal(found[:, part], expected) and torch.equal(unit[:, part], scale.expand(-1, 16))


def test_impossible_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 1 or more"):
        ActivationFormat(8, "group")
    with pytest.raises(ValueError, match="not a group"):
        ActivationFormat(8, "group", "unsigned", group_size=16)
    with pytest.raises(ValueError, match="at most 7 bits"):
        ActivationFormat(8, "token", "midrise")
    with pytest.raises(ValueError, match="clip factor"):
        ActivationFormat(4, "token", clip=1.2)
    with pytest.raises(ValueError, match="calibrated scale"):
        ActivationFormat(4, "tensor").quantize(rows())


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("grid", ["symmetric", "midrise"])
def test_the_clip_factor_is_the_one_of_least_output_error(grid: str, granularity: str) -> None:
    """Channels of independent values: the diagonal is then all of the output error, which is computed in full here."""
    x = torch.randn(800, 48, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 0.5, 48)
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(2)) * torch.logspace(1, 0, 48)
    form = ActivationFormat(4, granularity, grid)  # type: ignore[arg-type]
    absmax = x.abs().max() if granularity == "tensor" else None
    found = best_clip(x, form, column_energy([weight]), absmax)

    def output_error(clip: float) -> float:
        tried = ActivationFormat(4, granularity, grid, clip)  # type: ignore[arg-type]
        lost = tried.rounded(x, None if absmax is None else tried.scale(absmax)) - x
        return float((lost.double() @ weight.double().T).square().sum())

    errors = {clip: output_error(clip) for clip in CLIPS}
    assert found.clip < 1 and errors[found.clip] < errors[1.0]
    # 800 x 48 errors of either sign: the terms between channels are sqrt(2 / 38400) = 0.7 % of the sum; five of them
    assert errors[found.clip] < 1.035 * min(errors.values())


def test_eight_bits_are_not_clipped() -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(3))
    assert best_clip(x, ActivationFormat(8, "token"), torch.ones(64).double()).clip == 1


def test_sixteen_levels_lose_less_than_fifteen() -> None:
    """Steps of 1/8 instead of 1/7 of the maximum: the error falls to (7/8)^2 = 0.77 of what it was, but for the maximum itself.

    That is exact on a symmetric grid, and half a step off on the other, with three times the error of the 63 others.
    """
    x, energy = torch.randn(2000, 64, generator=torch.Generator().manual_seed(4)), torch.ones(64).double()
    forms = [ActivationFormat(4, "token", "midrise"), ActivationFormat(4, "token")]
    midrise, symmetric = (input_error(x, form, energy) for form in forms)
    # two means of 128000 squared uniform errors: 2 sqrt(4/5 / 128000) = 0.5 % relative deviation; five of them
    assert midrise / symmetric == pytest.approx((7 / 8) ** 2 * (63 + 3) / 63, rel=0.025)
