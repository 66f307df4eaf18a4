import math

import pytest
import torch

from ditq.numerics.codebook import Fit, fit_twin_log, fit_twin_log_shared, fit_uniform
from ditq.numerics.rounding import output_error, round_gptq, round_nearest

torch.set_num_threads(1)


def correlated_hessian(columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """X^T X / N of inputs whose principal components fall off as 1/k, as the inputs of trained layers do."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=g, dtype=torch.float64))[0]
    x = x * torch.arange(1, columns + 1) ** -0.5 @ basis * (0.5 + torch.rand(columns, generator=g))
    return (x.T @ x / len(x)).to(dtype)


def make_weight(rows: int, columns: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


FITS = {
    "table a row": lambda w: fit_twin_log(w, 3),
    "shared table": lambda w: fit_twin_log_shared(w, 4),
    "group multipliers": lambda w: fit_twin_log_shared(w, 3, group_size=24),
    "group scales": lambda w: fit_twin_log_shared(w, 3, group_size=32, float_group_scales=True),
    "uniform": lambda w: fit_uniform(w, 4),
    "uniform, group multipliers": lambda w: fit_uniform(w, 4, group_size=32),
}


def gptq_reference(
    weight: torch.Tensor, hessian: torch.Tensor, fit: Fit, damping: float, activation_order: bool
) -> torch.Tensor:
    """The paper's own steps, one weight column at a time in float64, with the inverse Hessian held explicitly.

    q = nearest(w_i); w -= (w_i - q) / Hinv_ii Hinv_i,: ; then row and column i are eliminated from Hinv.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    columns = weight.shape[1]
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(columns))
    order = hessian.diagonal().argsort(descending=True, stable=True) if activation_order else torch.arange(columns)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for i in order.tolist():
        levels = fit.levels()[:, i // fit.group_size if fit.group_size else 0].double()
        codes[:, i] = (weight[:, i, None] - levels).abs().argmin(dim=1).to(torch.uint8)
        error = (weight[:, i] - levels.gather(1, codes[:, i, None].long())[:, 0]) / inverse[i, i]
        weight -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]
    return codes


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("make", FITS.values(), ids=FITS)
def test_gptq_picks_the_codes_of_the_explicit_inverse_hessian(make, activation_order: bool) -> None:
    weight, hessian = make_weight(24, 96), correlated_hessian(96)
    fit = make(weight)
    code = round_gptq(weight, hessian, fit, block=20, activation_order=activation_order)
    expected = gptq_reference(weight, hessian, fit, 0.01, activation_order)
    # float32 against float64 can only differ where a weight lies within about 1e-6 of a midpoint: here at most one row
    assert int((code.codes != expected).any(dim=1).sum()) <= 1
    assert code.damping == 0.01


@pytest.mark.parametrize("make", FITS.values(), ids=FITS)
def test_gptq_nearly_halves_the_output_error_of_correlated_inputs(make) -> None:
    weight, hessian = make_weight(64, 384), correlated_hessian(384)
    fit = make(weight)
    nearest = output_error(weight, round_nearest(weight, fit).decode(), hessian)
    gptq = output_error(weight, round_gptq(weight, hessian, fit).decode(), hessian)
    assert gptq < nearest / 1.8


def test_the_block_size_changes_nothing() -> None:
    weight, hessian = make_weight(16, 100), correlated_hessian(100)
    fit = fit_twin_log(weight, 3)
    codes = [round_gptq(weight, hessian, fit, block=block).codes for block in (1, 7, 100, 128)]
    assert all(int((other != codes[0]).any(dim=1).sum()) <= 1 for other in codes[1:])


def test_uncorrelated_inputs_leave_nothing_to_correct() -> None:
    weight = make_weight(16, 64)
    fit = fit_twin_log_shared(weight, 3)
    code = round_gptq(weight, torch.diag(torch.rand(64) + 0.1), fit)
    assert torch.equal(code.codes, round_nearest(weight, fit).codes)


def test_a_column_whose_input_is_always_zero_takes_its_nearest_level() -> None:
    weight, hessian = make_weight(16, 64), correlated_hessian(64)
    dead = [0, 13, 63]
    hessian[dead] = 0
    hessian[:, dead] = 0
    fit = fit_twin_log(weight, 3)
    live = [i for i in range(64) if i not in dead]
    for activation_order in (True, False):
        code = round_gptq(weight, hessian, fit, activation_order=activation_order)
        assert torch.equal(code.codes[:, dead], round_nearest(weight, fit).codes[:, dead])
        alone = round_gptq(weight[:, live], hessian[live][:, live], fit, activation_order=activation_order)
        assert torch.equal(code.codes[:, live], alone.codes)
    nothing = round_gptq(weight, torch.zeros(64, 64), fit)
    assert torch.equal(nothing.codes, round_nearest(weight, fit).codes)


def test_a_singular_hessian_gets_the_damping_that_it_needs_and_says_so() -> None:
    weight, x = make_weight(8, 64), torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    fit = fit_uniform(weight, 4)
    hessian = x.T @ x  # rank 5
    code = round_gptq(weight, hessian, fit, damping=0.0)
    assert code.damping > 0
    assert output_error(weight, code.decode(), hessian) < output_error(
        weight, round_nearest(weight, fit).decode(), hessian
    )
    indefinite = correlated_hessian(64)
    indefinite -= 0.3 * indefinite.diagonal().mean() * torch.eye(64)
    assert round_gptq(weight, indefinite, fit).damping == pytest.approx(1.0)


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = make_weight(8, 64), correlated_hessian(64)
    fit = fit_uniform(weight, 4)
    assert torch.equal(round_gptq(weight, hessian * 2.0**20, fit).codes, round_gptq(weight, hessian, fit).codes)


def test_the_output_error_is_the_error_of_the_outputs() -> None:
    x = torch.randn(200, 32, dtype=torch.float64)
    weight = torch.randn(8, 32, dtype=torch.float64)
    approx = weight + 0.1 * torch.randn(8, 32, dtype=torch.float64)
    expected = ((x @ (weight - approx).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert output_error(weight, approx, x.T @ x) == pytest.approx(expected, rel=1e-12)
    assert output_error(weight, weight, x.T @ x) == 0.0
    assert output_error(torch.zeros(2, 32), torch.zeros(2, 32), x.T @ x) == 0.0


def test_inputs_are_left_as_they_were() -> None:
    weight, hessian = make_weight(4, 32), correlated_hessian(32, dtype=torch.float64)
    before = weight.clone(), hessian.clone()
    round_gptq(weight, hessian, fit_uniform(weight, 4))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hessian": torch.full((32, 32), torch.nan)}, "Hessian holds values that are not finite"),
        ({"hessian": torch.eye(31)}, "not of a weight"),
        ({"hessian": -1e6 * torch.ones(32, 32) + 1e6 * 1.5 * torch.eye(32)}, "not positive definite"),
        ({"damping": -1.0}, "damping of 0 or more"),
        ({"block": 0}, "block of 1 or more"),
        ({"weight": torch.full((4, 32), torch.nan)}, "weight holds values that are not finite"),
        ({"weight": torch.ones(5, 32)}, "not of a weight"),
    ],
)
def test_what_gptq_cannot_use_is_refused(change: dict, words: str) -> None:
    weight = make_weight(4, 32)
    arguments = {"weight": weight, "hessian": correlated_hessian(32), "fit": fit_uniform(weight, 4), **change}
    with pytest.raises(ValueError, match=words):
        round_gptq(**arguments)


def test_an_error_beyond_float32_is_not_a_perfect_one() -> None:
    weight = torch.ones(2, 4)
    assert math.isnan(output_error(weight, weight * 2, torch.full((4, 4), 1e38)))
