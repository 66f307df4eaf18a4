"""How far a token's range reaches: the clip factor c of least error on sampled rows.

A value beyond c max|x| saturates; all others get a finer step. With few bits that is a gain, with 8 bits seldom. The error
of a channel counts by the energy of the weights that read it, so that for errors that do not depend on one another it is
that of the outputs:

    E|(x_q - x) W^T|^2 ~ sum_j E[(x_q - x)_j^2] sum_o W_oj^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditq.numerics.activation_format import ActivationFormat

CLIPS = tuple(1 - number / 40 for number in range(21))  # 1, 0.975, ... 0.5
MOST_ROWS = 1024


def column_energy(weights: Sequence[Tensor]) -> Tensor:
    """sum_o W_oj^2 over the weights [O_i, C] that read one input: float64 [C]."""
    return torch.stack([weight.double().square().sum(0) for weight in weights]).sum(0)


def input_error(rows: Tensor, form: ActivationFormat, energy: Tensor, absmax: Tensor | None = None) -> float:
    """Squared error of the quantized rows [n, C] over their own square, channels counting by energy [C].

    absmax: [] or [n, 1], the calibrated largest magnitude of each row, for formats whose scale is not the token's own.
    """
    scale = None if absmax is None else form.scale(absmax)
    error = (form.rounded(rows, scale) - rows).double().square().sum(0)
    whole = (rows.double().square().sum(0) * energy).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((error * energy).sum() / whole)


def best_clip(rows: Tensor, form: ActivationFormat, energy: Tensor, absmax: Tensor | None = None) -> ActivationFormat:
    """The format with the clip factor, of CLIPS, of least error; of equal ones the largest."""
    stride = -(-len(rows) // MOST_ROWS) or 1
    rows, absmax = rows[::stride], absmax if absmax is None or absmax.dim() == 0 else absmax[::stride]
    return min((replace(form, clip=clip) for clip in CLIPS), key=lambda tried: input_error(rows, tried, energy, absmax))
