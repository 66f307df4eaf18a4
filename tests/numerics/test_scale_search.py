"""GPTQ with several scales: each row gets the best of what GPTQ alone would give with each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditq.numerics.codebook import CODEBOOKS
from ditq.numerics.rounding import round_gptq
from ditq.numerics.scale_search import candidate_factors, gptq_with_scale_search
from tests.numerics.test_gptq import correlated_hessian, make_weight


@pytest.mark.parametrize("settings", [{}, {"group_size": 16}, {"group_size": 16, "float_group_scales": True}])
def test_each_row_has_the_scale_that_gptq_loses_least_with(settings: dict[str, int]) -> None:
    weight, hessian = make_weight(12, 48), correlated_hessian(48)
    fit = CODEBOOKS["twin_log_shared"](weight, 3, importance=hessian.diagonal(), **settings)
    found_fit, found = gptq_with_scale_search(weight, hessian, fit, 5)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(48)

    def errors(approx: torch.Tensor) -> torch.Tensor:
        difference = (weight - approx).double()
        return ((difference @ damped) * difference).sum(1)

    tried = [
        errors(round_gptq(weight, hessian, replace(fit, scale=fit.scale * f)).decode()) for f in candidate_factors(5)
    ]
    torch.testing.assert_close(errors(found.decode()), torch.stack(tried).amin(0), rtol=1e-4, atol=0)
    assert float(errors(found.decode()).sum()) < float(tried[0].sum())
    assert torch.equal(found_fit.scale, found.scale) and 1.0 in candidate_factors(4)
