"""Low-rank branch: the factors are the truncated SVD of the whitened weight, and coding what is left loses less."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ditq.numerics import low_rank
from ditq.numerics.codebook import CODEBOOKS, WeightCode
from ditq.numerics.low_rank import code_with_branch, fit_low_rank
from ditq.numerics.rounding import output_error, round_gptq

ROWS, COLUMNS, RANK = 40, 56, 5


def _weight_and_hessian() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of falling singular values behind correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(ROWS, 8, generator=generator) @ torch.randn(8, COLUMNS, generator=generator)
    weight = strong + 0.7 * torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(400, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    x *= torch.linspace(0.2, 3, COLUMNS)
    return weight, x.T @ x / len(x)


def _lost(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = weight.double() - approximation.double()
    return float((difference @ hessian.double() * difference).sum())


@pytest.mark.parametrize("exact", [True, False], ids=["eigenvectors", "subspace iteration"])
def test_the_output_error_is_that_of_the_truncated_svd_behind_the_hessians_root(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(low_rank, "_EXACT_UP_TO", 0)
    weight, hessian = _weight_and_hessian()
    singular = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(hessian.double()))
    least = float(singular[RANK:].square().sum())
    branch = fit_low_rank(weight, hessian, RANK)
    # A grid of n steps adds (max / rms)^2 / (12 n^2) of the factor's square. With a max / rms of at most 5 that is 5e-4 for
    # n = 64 and 1e-4 for n = 127, and up to ten times that in directions that the Hessian weighs more: below 1 %.
    assert least * (1 - 1e-9) < _lost(weight, branch.product(), hessian) < least + 0.01 * float(singular.square().sum())
    assert branch.product().shape == (ROWS, COLUMNS) and branch.rank == RANK
    assert int(branch.down.abs().max()) <= 64


def _coded(weight: torch.Tensor, hessian: torch.Tensor, rank: int) -> WeightCode:
    def code(part: torch.Tensor) -> WeightCode:
        return round_gptq(part, hessian, CODEBOOKS["twin_log_shared"](part, 4))

    if not rank:
        return code(weight)
    return code_with_branch(weight, hessian, rank, code, partial(output_error, weight, hessian=hessian))


def test_what_the_codes_lose_falls_with_the_rank() -> None:
    weight, hessian = _weight_and_hessian()
    errors = [output_error(weight, _coded(weight, hessian, rank).decode(), hessian) for rank in (0, 2, 8)]
    # The remainder's own size: with the 8 strong directions out, 0.49 of 8.49 of the weight's mean square is left, less
    # what they hold of the rest. The first turn must win most of that.
    assert errors[2] < 0.2 * errors[0]
    assert errors[2] < errors[1] < errors[0]


def test_the_turn_of_least_error_is_kept_whatever_comes_after() -> None:
    weight, hessian = _weight_and_hessian()
    tried: list[float] = []

    def worse_and_worse(approximation: torch.Tensor) -> float:
        tried.append(output_error(weight, approximation, hessian) * (3 if len(tried) else 1))
        return tried[-1]

    def code(part: torch.Tensor) -> WeightCode:
        return round_gptq(part, hessian, CODEBOOKS["uniform"](part, 3))

    kept = code_with_branch(weight, hessian, 4, code, worse_and_worse)
    assert len(tried) == 2
    assert output_error(weight, kept.decode(), hessian) == pytest.approx(tried[0])


@pytest.mark.parametrize("rank", [0, ROWS + 1])
def test_a_rank_that_the_weight_does_not_have_is_refused(rank: int) -> None:
    weight, hessian = _weight_and_hessian()
    with pytest.raises(ValueError, match="has no branch of rank"):
        fit_low_rank(weight, hessian, rank)


def test_a_weight_of_zeros_has_a_branch_of_zeros() -> None:
    branch = fit_low_rank(torch.zeros(8, 12), torch.eye(12), 2)
    assert not branch.product().any()
