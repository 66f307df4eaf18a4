"""The scale of each row by what rounding really loses: GPTQ with several scales, the best one a row.

A codebook's scale is that of least error when every weight goes to its nearest level. GPTQ moves weights away from
there, so another scale may suit it better. Rows are independent in GPTQ; each keeps the candidate that served it best.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ditq.numerics.rounding import GptqCode, round_gptq
from ditq.numerics.weight_code import Fit, row_chunks

SPREAD = 0.15  # the widest candidates are 1 -+ this times the codebook's scale


def candidate_factors(count: int) -> list[float]:
    """`count` factors of the scale, evenly from 1 - SPREAD to 1 + SPREAD, and 1 itself."""
    found = {1.0} | {1 - SPREAD + 2 * SPREAD * i / max(count - 1, 1) for i in range(count)}
    return sorted(found, key=lambda factor: abs(factor - 1))


def gptq_with_scale_search(
    weight: torch.Tensor, hessian: torch.Tensor, fit: Fit, candidates: int, damping: float = 0.01
) -> tuple[Fit, GptqCode]:
    """weight [O, I], hessian [I, I] -> the fit with each row's best scale, and its GPTQ code.

    A row of several group scales gets one factor for all of them. candidates: how many factors are tried; each costs a
    GPTQ. No row's output error under the damped Hessian is above that of GPTQ with the fit as it was.

    Raises:
        ValueError: as `round_gptq`.
    """
    best: GptqCode | None = None
    least = torch.full((len(weight),), torch.inf, dtype=torch.float64, device=weight.device)
    for factor in candidate_factors(candidates):
        tried = replace(fit, scale=fit.scale * factor)
        code = round_gptq(weight, hessian, tried, damping=damping)
        errors = row_errors(weight, code.decode(), hessian, code.damping)
        better = errors < least
        if best is None:
            best = code
        else:
            scale = better if fit.scale.dim() == 1 else better[:, None]
            best = replace(
                best,
                codes=torch.where(better[:, None], code.codes, best.codes),
                scale=torch.where(scale, code.scale, best.scale),
            )
        least = torch.minimum(errors, least)
    assert best is not None
    return replace(fit, scale=best.scale), best


def row_errors(weight: torch.Tensor, approx: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """(W - W') (H + damping mean(diag H) I) (W - W')^T by row: float64 [O]."""
    added = damping * float(hessian.diagonal().mean())
    found = torch.empty(len(weight), dtype=torch.float64, device=weight.device)
    for rows in row_chunks(*weight.shape):
        difference = weight[rows].float() - approx[rows]
        found[rows] = ((difference @ hessian.float() + added * difference).double() * difference).sum(1)
    return found
