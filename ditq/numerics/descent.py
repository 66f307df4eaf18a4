"""Coordinate descent: rounding again, each weight given all the others, and scales given the codes.

GPTQ rounds every column once and looks only forward. What it found is improved here on the same objective,

    E = tr(D H D^T),   D = W - Q,   H = E[x^T x],

by turns. Codes: with G = D H, moving column j of Q by d changes E by d^2 H_jj - 2 d G_j, so the best level is the one
nearest to q_j + G_j / H_jj (QuantEase, Behdin et al., arXiv 2309.01885). Scales: E is quadratic in factors f_g of the
scales of a row's groups, with the normal equations sum_h <Q_g H, Q_h> f_h = <W H, Q_g>; for one scale a row this is
f = <W H, Q> / <Q H, Q>. Scales are taken row by row where E falls, so that no turn can raise it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditq.numerics.block_scales import rescaled_blocks
from ditq.numerics.carrier import E4M3
from ditq.numerics.rounding import ColumnLevels
from ditq.numerics.weight_code import SMALLEST_SCALE, Fit, WeightCode, check_fit, row_chunks

_GROUP_TURNS = 2  # before the first sweeps; each costs as much as a sweep, and those after them gain less than one
_AT_ONCE = 1 << 24  # weights whose rows are settled together: each column is a turn of its own, whatever it holds
_RIDGE = 1e-6  # of the normal equations' mean diagonal: a group whose codes all stand for almost nothing stays solvable


def refine(
    weight: Tensor, hessian: Tensor, fit: Fit, code: WeightCode, sweeps: int, damping: float = 0.01, block: int = 128
) -> WeightCode:
    """A code of `weight` [O, I] under `fit`, improved by up to `sweeps` sweeps over the columns; rows are independent.

    Args:
        hessian: [I, I], E[x^T x] of the layer's input, any scale.
        fit: whose levels `code` has; its scales and multipliers may be replaced, its table stays.
        damping: share of the mean diagonal added to it, against fitting what the calibration cannot tell.
        block: columns between two large products.

    Returns:
        Codes, scales and multipliers with which no row's error under the damped Hessian is above that of `code`.

    Raises:
        ValueError: when the fit or the Hessian is of another shape, or the Hessian is not finite.
    """
    check_fit(weight, fit)
    damped = hessian.float().clone()
    if damped.shape != (weight.shape[1],) * 2 or not bool(damped.isfinite().all()):
        raise ValueError(f"the Hessian of a weight {list(weight.shape)} must be finite and [I, I]")
    diagonal = damped.diagonal()
    if not bool((diagonal > 0).any()):
        return code  # the input was always zero: every code is as good
    dead = diagonal <= 0  # always zero, or no more than float32 loses where the mean was taken out
    damped[dead] = 0
    damped[:, dead] = 0
    diagonal[dead] = 0
    diagonal += max(damping, 1e-6) * diagonal[diagonal > 0].mean()
    codes, scale = code.codes.clone(), code.scale.clone()
    multiplier = None if code.multiplier is None else code.multiplier.clone()
    for rows in row_chunks(len(weight), weight.shape[1], _AT_ONCE):
        part = _rows_of(fit, code, rows)
        found = _descend(weight[rows].float(), damped, part, codes[rows].clone(), sweeps, block)
        codes[rows], scale[rows] = found.codes, found.fit.scale
        if multiplier is not None and found.fit.multiplier is not None:
            multiplier[rows] = found.fit.multiplier
    return replace(code, codes=codes, scale=scale, multiplier=multiplier)


@dataclass(frozen=True, eq=False)
class _State:
    """Levels and codes uint8 [R, I] of some rows, what they stand for, values float32 [R, I], and pull = (W - values) H.

    A product with H is what costs here, so `pull` is carried on wherever it follows from one that is known.
    """

    fit: Fit
    codes: Tensor
    values: Tensor
    pull: Tensor

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, fit: Fit, codes: Tensor) -> _State:
        values = WeightCode(codes, fit.table, fit.scale, fit.multiplier, fit.bits).decode()
        return cls(fit, codes, values, (weight - values) @ hessian)

    def errors(self, weight: Tensor) -> Tensor:
        """E of each row [R]."""
        return (self.pull * (weight - self.values)).sum(1)

    def where(self, better: Tensor, other: _State) -> _State:
        """This state, with the rows marked in `better` [R] taken from the other."""

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(better.view(-1, *[1] * (a.dim() - 1)), b, a)

        fit, mine, theirs = self.fit, self.fit.multiplier, other.fit.multiplier
        multiplier = None if mine is None or theirs is None else pick(mine, theirs)
        fit = replace(fit, scale=pick(fit.scale, other.fit.scale), multiplier=multiplier)
        rest = ((self.codes, other.codes), (self.values, other.values), (self.pull, other.pull))
        return _State(fit, *(pick(*pair) for pair in rest))


def _rows_of(fit: Fit, code: WeightCode, rows: slice) -> Fit:
    table = fit.table if fit.table.dim() == 1 else fit.table[rows]
    multiplier = None if code.multiplier is None else code.multiplier[rows]
    return replace(fit, table=table, scale=code.scale[rows], multiplier=multiplier)


def _descend(weight: Tensor, hessian: Tensor, fit: Fit, codes: Tensor, sweeps: int, block: int) -> _State:
    wanted = weight @ hessian
    first = state = _State.of(weight, hessian, fit, codes)
    for turn in range(sweeps + 1):
        if fit.groups > 1 and turn < _GROUP_TURNS:
            state = _with_group_scales(weight, hessian, state)
        state = _with_row_scales(wanted, state)
        if turn == sweeps:
            break
        codes = state.codes
        state = _swept(hessian, state, block)
        if torch.equal(codes, state.codes):
            break
    state = _State.of(weight, hessian, state.fit, state.codes)
    # Each step can only gain in exact arithmetic; in float32 a row that was settled may lose its last digits.
    return first.where(state.errors(weight) < first.errors(weight), state)


def _swept(hessian: Tensor, state: _State, block: int) -> _State:
    """The state after every column has had its turn."""
    values = state.values.T.contiguous()  # [I, R]: a column of the weight is a row here
    pull = state.pull.T.contiguous()
    codes, levels = torch.empty(values.shape, dtype=torch.uint8, device=values.device), ColumnLevels(state.fit)
    for start in range(0, len(values), block):
        part = slice(start, min(start + block, len(values)))
        local, moved = pull[part].clone(), torch.empty_like(values[part])
        for column in range(part.start, part.stop):
            i = column - start
            codes[column], level = levels.nearest(column, values[column] + local[i] / hessian[column, column])
            torch.sub(level, values[column], out=moved[i])
            local[i + 1 :].addr_(hessian[column, column + 1 : part.stop], moved[i], alpha=-1)
        values[part] += moved
        pull.addmm_(hessian[:, part], moved, alpha=-1)
    return _State(state.fit, codes.T.contiguous(), values.T.contiguous(), pull.T.contiguous())


def _with_group_scales(weight: Tensor, hessian: Tensor, state: _State) -> _State:
    """The state with the scales of groups that suit its codes best, in the rows that gain by them."""
    normal, right = _normal_equations(hessian, state)
    ridge = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(SMALLEST_SCALE)
    normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    factor = 1 + torch.linalg.solve_ex(normal, right)[0].float()  # the ridge draws towards 1
    factor = torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor))
    # Multipliers are rounded, so what they give is measured.
    other = _State.of(weight, hessian, _scaled_groups(state.fit, factor), state.codes)
    return state.where(other.errors(weight) < state.errors(weight), other)


def _with_row_scales(wanted: Tensor, state: _State) -> _State:
    """The state with the scale of each row that suits its codes best; wanted = W H."""
    fit, values, reached = state.fit, state.values, wanted - state.pull  # Q H
    own = (reached * values).sum(1)
    more = (state.pull * values).sum(1) / own.clamp_min(torch.finfo(torch.float32).tiny)  # of a scale: f - 1
    more = torch.where((own > 0) & (more > -1), more, torch.zeros_like(more))[:, None]
    scale = fit.scale * (1 + (more[:, 0] if fit.scale.dim() == 1 else more))
    fit = replace(fit, scale=scale.clamp_min(SMALLEST_SCALE))
    return _State(fit, state.codes, values * (1 + more), state.pull - more * reached)


def _normal_equations(hessian: Tensor, state: _State) -> tuple[Tensor, Tensor]:
    """<Q_g H, Q_h> [R, G, G] and <D H, Q_g> [R, G] of the groups of columns, float64."""
    values, groups = state.values, state.fit.groups
    size = values.shape[1] // groups
    normal = torch.empty(len(values), groups, groups, dtype=torch.float64, device=values.device)
    for group in range(groups):
        start = group * size
        product = values[:, start : start + size] @ hessian[start : start + size, start:]
        row = product.mul_(values[:, start:]).unflatten(1, (groups - group, size)).sum(2)
        normal[:, group, group:] = normal[:, group:, group] = row
    return normal, (state.pull * values).unflatten(1, (groups, size)).sum(2).double()


def _scaled_groups(fit: Fit, factor: Tensor) -> Fit:
    """The fit with each group's scale times its factor [R, G]; as multipliers of 1/255 or FP8 numbers where it has those."""
    if fit.multiplier is None:
        return replace(fit, scale=(fit.scale * factor).clamp_min(SMALLEST_SCALE))
    wanted = fit.multiplier.float() * factor
    if fit.multiplier.dtype == E4M3:
        scale, blocks = rescaled_blocks(fit.scale, wanted)
        return replace(fit, scale=scale, multiplier=blocks)
    row = wanted.amax(1)
    multiplier = (wanted / row[:, None] * 255).round().clamp(1, 255).to(torch.uint8)
    return replace(fit, scale=(fit.scale * row / 255).clamp_min(SMALLEST_SCALE), multiplier=multiplier)
