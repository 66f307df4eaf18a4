"""Which codebook a linear gets: the check that a named one takes what is asked of it, and the choice that `auto` makes.

`auto` codes a part of the weight with each of several codebooks, just as the recipe codes the whole, on statistics that lack
some of the sampled rows, and compares the layer's outputs on those. The first of the list is kept unless another is better
beyond noise. What a codebook stores more than the first counts against it: a bit a weight more divides the squared error
by 4 when it is spent on levels (6 dB a bit), so its error counts 4^(bits more) times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ditq.calibration.input_statistics import InputStatistics
from ditq.errors import DitqError
from ditq.formats import BitFormat
from ditq.numerics.codebook import CODEBOOKS, WeightCode
from ditq.passes.judging import MOST_OUTPUTS, choose, hold_out
from ditq.suggest import unknown_key

AUTO = "auto"
TRIED = ("twin_log_shared", "lloyd_max", "nf", "uniform")


def check_codebook(
    where: str, codebook: str, format: str, group_size: int = 0, codebooks: Sequence[str] | None = None
) -> None:
    """Raises DitqError for a name that no codebook has, and for bits or groups that the codebook does not take.

    codebooks: those that `auto` chooses from, each of which must take them; None where nothing is chosen.
    """
    if codebook == AUTO and codebooks is not None:
        for name in codebooks:
            check_codebook(f"{where}: codebooks", name, format, group_size)
        return
    bits = BitFormat.parse(format).weight
    if codebook not in CODEBOOKS:
        raise DitqError(unknown_key(f"{where}: codebook", codebook, list(CODEBOOKS)))
    refusal = (
        CODEBOOKS[codebook].refusal(bits, group_size) if bits < 8 else None
    )  # 8 bits are uniform whatever the name
    if refusal:
        raise DitqError(f"{where}: {refusal}")


def check_codebooks(where: str, codebooks: Sequence[str]) -> None:
    """Raises DitqError for a list that nothing can be chosen from: empty, a name twice, or one that no codebook has."""
    if not codebooks:
        raise DitqError(f"{where}: codebooks is empty; name at least one, the first of which is kept in doubt")
    for name in codebooks:
        if not isinstance(name, str) or name not in CODEBOOKS:
            raise DitqError(unknown_key(f"{where}: codebooks", str(name), list(CODEBOOKS)))
    if len(set(codebooks)) < len(codebooks):
        raise DitqError(f"{where}: codebooks names one twice: {', '.join(codebooks)}")


def bits_a_weight(code: WeightCode, outputs: int) -> float:
    """What a weight of so many output rows takes to store in the way of `code`, which holds some of its rows.

    Codes, table, scales and multipliers; branches are left out, which all codebooks have alike.
    """
    rows, columns = code.codes.shape
    one_table = code.table.dim() == 1
    tensors = [code.scale, code.multiplier, None if one_table else code.table]
    a_row = sum(_bits(tensor) for tensor in tensors if tensor is not None) / rows
    return code.bits + (a_row + (_bits(code.table) / outputs if one_table else 0)) / columns


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.numel() * tensor.element_size()


def choose_codebook(
    names: Sequence[str],
    weight: Tensor,
    statistics: InputStatistics,
    code: Callable[[str, Tensor, InputStatistics], tuple[WeightCode, Tensor]],
    inputs: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor | None = None,
    least_outputs: int = 0,
) -> str:
    """The name of the codebook for a weight [O, I].

    Args:
        names: of codebooks; the first is kept unless another is better.
        code: (name, some rows [o, I] of the weight, statistics to fit to) -> (their code, what the bias takes up [o]).
        inputs: (rows of the input [n, I], their bins [n]) -> the rows as the layer's products see them.
        weights: [B], how much a row of each bin counts; None for all the same.
        least_outputs: take at least so many rows of the weight, where it has them.
    """
    rest, places, worth = hold_out(statistics)
    if len(names) == 1 or not len(places):
        return names[0]
    bins, outputs = statistics.sample_bin[places], len(weight)
    if weights is not None:
        worth = worth * weights[bins]
    part = weight[:: -(-outputs // max(MOST_OUTPUTS, 2 * least_outputs))].contiguous()
    rows = statistics.sample[places].float()
    seen, expected = inputs(rows, bins), rows @ part.T
    energy = (worth * expected.double().square().sum(1)).mean().clamp_min(torch.finfo(torch.float64).tiny)
    codes = {name: code(name, part, rest) for name in names}
    stored = {name: bits_a_weight(found, outputs) for name, (found, _) in codes.items()}
    errors = {}
    for name, (found, shift) in codes.items():
        lost = (expected - (seen @ found.decode().T + shift)).double().square().sum(1)
        errors[name] = worth * lost / energy * 4 ** (stored[name] - stored[names[0]])
    return choose(errors, tolerance=0.0)
