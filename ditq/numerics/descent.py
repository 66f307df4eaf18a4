"""Coordinate descent: rounding again, each weight given all the others, until none wants another level.

GPTQ rounds every column once and looks only forward. What it found is improved here on the same objective,

    E = tr(D H D^T),   D = W - Q,   H = E[x^T x],

by turns: the scale of each row in closed form, f = <W H, Q> / <Q H, Q>, and every code in turn. With G = D H, moving
column j by d changes E by d^2 H_jj - 2 d G_j, so the best level is the one nearest to q_j + G_j / H_jj. Neither step can
raise E. (Coordinate descent after GPTQ: QuantEase, Behdin et al., arXiv 2309.01885.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ditq.numerics.rounding import ColumnLevels
from ditq.numerics.weight_code import Fit, WeightCode, check_fit, row_chunks


def refine(
    weight: Tensor, hessian: Tensor, fit: Fit, code: WeightCode, sweeps: int, damping: float = 1e-3, block: int = 128
) -> WeightCode:
    """A code of `weight` [O, I] under `fit`, improved by up to `sweeps` sweeps over the columns; rows are independent.

    Args:
        hessian: [I, I], E[x^T x] of the layer's input.
        damping: share of the mean diagonal added to it, against fitting what the calibration cannot tell.
        block: columns between two large products.

    Returns:
        Codes and scales whose error is not above that of `code`; table and multipliers as they are.

    Raises:
        ValueError: when the fit or the Hessian is of another shape, or the Hessian is not finite.
    """
    check_fit(weight, fit)
    damped = hessian.float().clone()
    diagonal = damped.diagonal()
    if damped.shape != (weight.shape[1],) * 2 or not bool(damped.isfinite().all()):
        raise ValueError(f"the Hessian of a weight {list(weight.shape)} must be finite and [I, I]")
    if not bool((diagonal > 0).any()):
        return code  # the input was always zero: every code is as good
    diagonal += damping * diagonal[diagonal > 0].mean()
    codes, scale = code.codes.clone(), code.scale.clone()
    for rows in row_chunks(*weight.shape):
        part = _rows_of(fit, replace(code, scale=scale), rows)
        codes[rows], scale[rows] = _descend(weight[rows].float(), damped, part, codes[rows], sweeps, block)
    return replace(code, codes=codes, scale=scale)


def _rows_of(fit: Fit, code: WeightCode, rows: slice) -> Fit:
    """The fit of some rows, with the scales that the code has by now."""
    table = fit.table if fit.table.dim() == 1 else fit.table[rows]
    multiplier = None if fit.multiplier is None else fit.multiplier[rows]
    return replace(fit, table=table, scale=code.scale[rows], multiplier=multiplier)


def _descend(
    weight: Tensor, hessian: Tensor, fit: Fit, codes: Tensor, sweeps: int, block: int
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, I] and scales of some rows after the descent."""
    wanted, width = weight @ hessian, weight.shape[1]
    codes = codes.clone()
    for _ in range(sweeps):
        values = WeightCode(codes, fit.table, fit.scale, fit.multiplier, fit.bits).decode()
        product = values @ hessian
        factor = _best_factor((wanted * values).sum(1), (product * values).sum(1))
        fit = replace(fit, scale=fit.scale * (factor if fit.scale.dim() == 1 else factor[:, None]))
        values, gradient = values * factor[:, None], wanted - product * factor[:, None]
        levels, before = ColumnLevels(fit), codes.clone()
        for start in range(0, width, block):
            part = slice(start, min(start + block, width))
            local, moved = gradient[:, part].contiguous(), torch.zeros_like(values[:, part])
            for column in range(part.start, part.stop):
                here = column - start
                target = values[:, column] + local[:, here] / hessian[column, column]
                code, level = levels.nearest(column, target)
                codes[:, column] = code.to(torch.uint8)
                moved[:, here] = level - values[:, column]
                local -= moved[:, here, None] * hessian[column, part]
            gradient -= moved @ hessian[part]
        if torch.equal(codes, before):
            break
    return codes, fit.scale


def _best_factor(wanted: Tensor, own: Tensor) -> Tensor:
    """<W H, Q> / <Q H, Q> by row; 1 where a row has no energy or would turn round."""
    factor = wanted / own.clamp_min(torch.finfo(own.dtype).tiny)
    return torch.where((own > 0) & (factor > 0), factor, torch.ones_like(factor))
