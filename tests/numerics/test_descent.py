"""Coordinate descent after GPTQ, against float64 and against every code that there is."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ditq.numerics.codebook import CODEBOOKS, Fit, WeightCode, encode
from ditq.numerics.descent import refine
from ditq.numerics.rounding import output_error, round_gptq

FITS = [
    ("uniform", 3, {}),
    ("twin_log", 3, {}),
    ("twin_log_shared", 4, {"group_size": 16}),
    ("uniform", 4, {"group_size": 16, "float_group_scales": True}),
]


def _problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def _rows_error(weight: torch.Tensor, code: WeightCode, hessian: torch.Tensor) -> torch.Tensor:
    difference = (weight - code.decode()).double()
    return ((difference @ hessian.double()) * difference).sum(1)


@pytest.mark.parametrize(("codebook", "bits", "settings"), FITS)
def test_no_sweep_makes_a_row_worse_and_together_they_gain(codebook: str, bits: int, settings: dict[str, int]) -> None:
    weight, hessian = _problem(24, 64)
    fit = CODEBOOKS[codebook](weight, bits, importance=hessian.diagonal(), **settings)
    code = round_gptq(weight, hessian, fit)
    found = [_rows_error(weight, code, hessian)]
    for sweeps in (1, 2, 8):
        refined = refine(weight, hessian, fit, code, sweeps, damping=0.0)
        found.append(_rows_error(weight, refined, hessian))
        assert bool((found[-1] <= found[-2] * (1 + 1e-4)).all())
    assert float(found[-1].sum()) < 0.95 * float(found[0].sum())
    assert refined.table is code.table and refined.scale.shape == code.scale.shape


def test_at_the_end_no_single_code_can_be_bettered() -> None:
    weight, hessian = _problem(6, 12)
    fit = CODEBOOKS["uniform"](weight, 3)
    code = refine(weight, hessian, fit, encode(weight, fit), 50, damping=0.0)
    best = _rows_error(weight, code, hessian)
    for column in range(12):
        for level in range(8):
            codes = code.codes.clone()
            codes[:, column] = level
            other = WeightCode(codes, code.table, code.scale, code.multiplier, code.bits)
            assert bool((_rows_error(weight, other, hessian) >= best * (1 - 1e-5)).all())


def test_with_inputs_that_do_not_go_together_it_finds_the_best_of_all_codes() -> None:
    weight = torch.tensor([[0.9, -0.35, 0.2, 0.05]])
    hessian = torch.diag(torch.tensor([4.0, 1.0, 0.5, 2.0]))
    fit = Fit(torch.tensor([-64, -21, 21, 64]).to(torch.int8), torch.tensor([0.01]), None, 2)
    worst = WeightCode(torch.zeros(1, 4, dtype=torch.uint8), fit.table, fit.scale, None, 2)
    found = refine(weight, hessian, fit, worst, 20, damping=0.0)
    errors = []
    for codes in product(range(4), repeat=4):
        carrier = fit.table.double()[list(codes)]
        moments = hessian.diagonal().double()
        scale = (moments * weight[0] * carrier).sum() / (moments * carrier * carrier).sum()
        errors.append(float((moments * (weight[0] - scale * carrier) ** 2).sum()))
    # By turns it may stop at a scale that suits its codes: never far from the best of all, and far below the start.
    assert float(_rows_error(weight, found, hessian)) < 1.5 * min(errors) + 1e-3


def test_an_input_that_is_always_zero_and_a_row_of_zeros_are_left_in_peace() -> None:
    weight, hessian = _problem(4, 16)
    weight[1] = 0
    hessian[3], hessian[:, 3] = 0, 0
    fit = CODEBOOKS["twin_log_shared"](weight, 4)
    code = refine(weight, hessian, fit, round_gptq(weight, hessian, fit), 3)
    assert bool(code.decode().isfinite().all()) and output_error(weight, code.decode(), hessian) < 0.1
    assert refine(weight, torch.zeros(16, 16), fit, code, 1) is code
    with pytest.raises(ValueError, match="must be finite"):
        refine(weight, torch.full((16, 16), torch.nan), fit, code, 1)
