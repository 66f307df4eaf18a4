"""Rounding: which level each weight takes. Nearest, or GPTQ, where later columns make up for the earlier errors.

The codebook is fixed before (`codebook.py`); rounding only picks codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ditq.numerics.weight_code import Fit, WeightCode, check_fit, encode, midpoints, row_chunks

LARGEST_DAMPING = 10.0  # of the mean diagonal: beyond that the Hessian no longer says anything


@dataclass(frozen=True, eq=False)
class GptqCode(WeightCode):
    """The code that GPTQ found. damping: what was added to the Hessian's diagonal, as a fraction of its mean."""

    damping: float = 0.0


def round_nearest(weight: torch.Tensor, fit: Fit) -> WeightCode:
    """weight [O, I] -> each weight's nearest level (round to nearest, RTN). Raises ValueError like `encode`."""
    return encode(weight, fit)


def _feedback(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """F float32 [I, I], strictly upper triangular, and the damping that it took.

    With H = V V^T, V upper triangular, in the given order of columns, the error of a rounding D = W - Q is
    tr(D H D^T) = |D V|^2, and column i of D V vanishes if q_i = w_i + sum_(j<i) d_j F_ji, F_ji = V_ji / V_ii. GPTQ's
    inverse-Hessian updates are the same thing (its Cholesky factor U of H^-1 is V^-1); this needs no inverse.
    """
    flipped = order.flip(0)  # V is the flipped Cholesky factor of the flipped matrix
    reversed_hessian = hessian[flipped[:, None], flipped].double()
    diagonal = reversed_hessian.diagonal()
    dead = diagonal <= 0  # an input that was always zero: nothing to correct, and nothing that could
    reversed_hessian[dead] = 0
    reversed_hessian[:, dead] = 0
    diagonal[dead] = 1
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    added = 0.0
    while True:
        diagonal += (damping - added) * mean
        added = damping
        factor, failed = torch.linalg.cholesky_ex(reversed_hessian)
        if not int(failed):
            break
        if damping >= LARGEST_DAMPING:
            raise ValueError(f"the Hessian is not positive definite, not even with a damping of {damping:g}")
        damping = min(max(damping * 10, 1e-4), LARGEST_DAMPING)
    del reversed_hessian
    factor /= factor.diagonal().clone()
    feedback = factor.float()
    del factor
    return feedback.flip(0, 1).triu_(1), damping


class ColumnLevels:
    """The levels [O, L] of one column after the other, in any order; columns of a group share them."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._group = -1
        self._levels = self._midpoints = torch.empty(0)

    def nearest(self, column: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """values [O] in that column -> (codes int64 [O], the levels that they stand for float32 [O])."""
        group = column // self._fit.group_size if self._fit.group_size else 0
        if group != self._group:
            self._group, self._levels = group, self._fit.levels(groups=slice(group, group + 1))[:, 0]
            self._midpoints = midpoints(self._levels)
        code = torch.searchsorted(self._midpoints, values[:, None])
        return code[:, 0], self._levels.gather(1, code)[:, 0]


def round_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fit: Fit,
    damping: float = 0.01,
    block: int = 128,
    activation_order: bool = True,
) -> GptqCode:
    """GPTQ (Frantar et al., arXiv 2210.17323) with a fixed codebook: weight [O, I], hessian [I, I] = X^T X, any scale.

    Columns are rounded one after the other, each to the level nearest to its weight plus what makes up for the errors
    so far, given how the inputs go together. All rows at once; `block` columns between two large products.

    damping: added to the Hessian's diagonal, as a fraction of its mean. If the Cholesky factorization still fails it is
    raised tenfold, up to 10; the code says what it took.
    activation_order: columns by falling diagonal (the inputs that matter most first). Groups stay those of the columns'
    own places. A column whose input was always zero takes its nearest level.

    Raises:
        ValueError: for shapes that do not fit, a Hessian that is not finite, or one that no damping makes definite.
    """
    check_fit(weight, fit)
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ValueError(f"a Hessian {list(hessian.shape)} is not of a weight {list(weight.shape)}")
    if not bool(hessian.isfinite().all()):
        raise ValueError("the Hessian holds values that are not finite")
    if not 0 <= damping < math.inf or block < 1:
        raise ValueError(f"GPTQ needs a damping of 0 or more and a block of 1 or more, not {damping} and {block}")
    order = torch.arange(columns, device=weight.device)
    if activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    feedback, damping = _feedback(hessian, order, damping)
    levels = ColumnLevels(fit)
    errors = torch.zeros(columns, rows, device=weight.device)  # D^T: a column of the weight is a row here
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, block):
        places = order[start : start + block]
        original = weight[:, places].T.float().contiguous()
        part = slice(start, start + len(places))
        target = original.addmm(feedback[:start, part].T, errors[:start])
        chosen = torch.empty(len(places), rows, dtype=torch.uint8, device=weight.device)
        for i, column in enumerate(places.tolist()):
            chosen[i], level = levels.nearest(column, target[i])
            error = torch.sub(original[i], level, out=errors[start + i])
            target[i + 1 :].addr_(feedback[start + i, start + i + 1 : part.stop], error)
        codes[:, places] = chosen.T
    return GptqCode(codes, fit.table, fit.scale, fit.multiplier, fit.bits, damping=damping)


def output_error(weight: torch.Tensor, approx: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative squared error of the layer's output: tr((W - W')H(W - W')^T) / tr(W H W^T), with H = X^T X.

    weight, approx [O, I]; hessian [I, I]. 0 for a perfect copy; also 0 where the layer's output is itself zero,
    and not a number where float32 does not hold it.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    hessian = hessian.to(dtype)
    lost = total = 0.0
    for part in row_chunks(*weight.shape):
        original = weight[part].to(dtype)
        difference = original - approx[part].to(dtype)
        lost += float(((difference @ hessian) * difference).sum(dtype=torch.float64))
        total += float(((original @ hessian) * original).sum(dtype=torch.float64))
    return 0.0 if total <= 0 else lost / total
