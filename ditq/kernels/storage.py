"""How a coded weight lies in GPU memory: an order of bits in which a kernel decodes four bytes at a time.

A weight [O, I] is cut along I into *runs* of 32 or 64 columns; a few runs make a *span*. Byte j of a span holds codes of
column j of each of its runs, so that what a byte gives belongs to different tiles of the product, and no two columns ever
have to be interleaved:

    bits  runs a span   byte (o, span, j) of `data`
    4     2             low nibble: column j of the first run; high nibble: of the second        [O, spans * run]
    2, 3  8, of 32      plane p, bit r: bit p of the code in column j of run r                   [bits, O, spans * 32]
    8     1             the carrier itself, int8 or FP8                                          [O, I]

Codes of 5, 6 and 7 bits, and FP8 carriers with group multipliers, are stored as their carriers, in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.weight_code import WeightCode

RUN, PLANE_RUN, PLANES = 64, 32, 8
_DECODED = (2, 3, 4)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight [rows, columns] as the kernels read it.

    bits: 2, 3, 4 or 8. data: as above. tables: the codes' carriers, as bytes, four an int32 word: [words], or [T, words]
    where every O / T rows have their own, a single row or those of one expert; None at 8 bits. multiplier: uint8 [O, G] or
    None. scale: float32 [O], or [O, G] by groups of columns. group: columns that share a multiplier or a scale, 0 where there
    are no groups. float8: whether the carriers are FP8 numbers.
    """

    rows: int
    columns: int
    bits: int
    run: int
    data: Tensor
    tables: Tensor | None
    multiplier: Tensor | None
    scale: Tensor
    group: int
    float8: bool

    @property
    def bytes(self) -> int:
        """What it takes of GPU memory."""
        tensors = (self.data, self.tables, self.multiplier, self.scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def rows_a_table(self) -> int:
        """Rows that share a table."""
        return self.rows if self.tables is None or self.tables.dim() == 1 else self.rows // len(self.tables)

    @property
    def table_a_row(self) -> bool:
        """Whether each row has a table of its own."""
        return self.tables is not None and self.tables.dim() == 2 and self.rows_a_table == 1


def runs_a_span(bits: int) -> int:
    """Runs whose codes share a byte."""
    return {8: 1, 4: 2}.get(bits, PLANES)


def why_not(group: int) -> str | None:
    """Why columns in groups of that many have no kernel, or None."""
    if group % PLANE_RUN:
        return f"groups of {group} columns are no multiple of {PLANE_RUN}"
    return None


def store(code: WeightCode) -> StoredWeight:
    """A coded weight in the order of the kernels, on the device that it is on.

    Raises:
        ValueError: groups of columns that no kernel has (`why_not`).
    """
    rows, columns = code.codes.shape
    grouped = code.multiplier if code.multiplier is not None else code.scale if code.scale.dim() == 2 else None
    group = 0 if grouped is None or grouped.shape[1] == 1 else columns // grouped.shape[1]
    if reason := why_not(group):
        raise ValueError(reason)
    float8 = code.table.dtype == torch.float8_e4m3fn
    scale = code.scale.float()
    scale = scale.flatten() if scale.numel() == rows else scale.contiguous()
    if code.bits not in _DECODED or (float8 and code.multiplier is not None):
        return store_carrier(code.carrier(), scale)
    run = PLANE_RUN if code.bits < 4 or group % RUN else RUN
    words = max(1, 2**code.bits // 4)
    tables = code.table.view(torch.int8).contiguous().view(torch.int32).reshape(*code.table.shape[:-1], words)
    multiplier = None if code.multiplier is None else code.multiplier.contiguous()
    group = columns if multiplier is not None and group == 0 else group
    return StoredWeight(
        rows, columns, code.bits, run, _data(code.codes, code.bits, run), tables, multiplier, scale, group, float8
    )


def store_carrier(carrier: Tensor, scale: Tensor) -> StoredWeight:
    """Carriers [O, I], int8 or FP8, with scales [O] or [O, G], as they are."""
    rows, columns = carrier.shape
    scale = scale.flatten() if scale.numel() == rows else scale
    group = columns // scale.shape[1] if scale.dim() == 2 else 0
    float8 = carrier.dtype == torch.float8_e4m3fn
    run = PLANE_RUN if group % RUN else RUN  # of one group: kernels read one scale a run
    return StoredWeight(rows, columns, 8, run, carrier.contiguous(), None, None, scale.float(), group, float8)


def why_not_stacked(weights: Sequence[StoredWeight]) -> str | None:
    """Why these cannot lie one after the other as one weight, or None."""

    def differ(what: Callable[[StoredWeight], object]) -> bool:
        return len({what(weight) for weight in weights}) > 1

    if differ(lambda w: (w.rows, w.columns)):
        return "their sizes differ"
    if differ(lambda w: (w.bits, w.float8, w.table_a_row)):
        return "their formats differ"
    if differ(lambda w: (w.group, w.run, w.multiplier is None, w.scale.dim())):
        return "their groups of columns differ"
    return None


def stack(weights: Sequence[StoredWeight]) -> StoredWeight:
    """Weights [O, I] of E experts as one [E O, I]; each keeps its own table."""
    first = weights[0]
    tables = [torch.atleast_2d(w.tables) for w in weights if w.tables is not None]
    multipliers = [w.multiplier for w in weights if w.multiplier is not None]
    return replace(
        first,
        rows=len(weights) * first.rows,
        data=torch.cat([w.data for w in weights], dim=-2),
        tables=torch.cat(tables) if tables else None,
        multiplier=torch.cat(multipliers) if multipliers else None,
        scale=torch.cat([w.scale for w in weights]),
    )


def _data(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes uint8 [O, I] -> the bytes of their spans; columns beyond I hold code 0, which meets an input of 0."""
    runs = runs_a_span(bits)
    spans = F.pad(codes, (0, -codes.shape[1] % (runs * run))).unflatten(1, (-1, runs, run))
    if bits == 4:
        return (spans[:, :, 0] | (spans[:, :, 1] << 4)).flatten(1).contiguous()
    planes = torch.zeros(bits, *spans[:, :, 0].shape, dtype=torch.uint8, device=codes.device)
    for plane in range(bits):
        for r in range(runs):
            planes[plane] |= ((spans[:, :, r] >> plane) & 1) << r
    return planes.flatten(2).contiguous()


def codes_meaning(stored: StoredWeight) -> Tensor:
    """The codes uint8 [O, I] that `data` holds, for 2 to 4 bits: what the kernels' decoding means."""
    data = stored.data
    if stored.bits == 4:
        spans = data.unflatten(-1, (-1, stored.run))
        return torch.stack((spans & 15, spans >> 4), dim=2).flatten(1)[:, : stored.columns]
    spans = data.unflatten(-1, (-1, stored.run))
    codes = torch.zeros(*spans.shape[1:3], PLANES, stored.run, dtype=torch.uint8, device=data.device)
    for plane in range(stored.bits):
        for r in range(PLANES):
            codes[:, :, r] |= ((spans[plane] >> r) & 1) << plane
    return codes.flatten(1)[:, : stored.columns]


def carrier_meaning(stored: StoredWeight) -> Tensor:
    """The carrier's numbers [O, I], int8 or FP8, in plain torch."""
    if stored.tables is None:
        return stored.data
    numbers = stored.tables.view(torch.int8)
    index = codes_meaning(stored).long()
    if numbers.dim() == 2:
        chosen = numbers.repeat_interleave(stored.rows_a_table, 0).gather(1, index)
    else:
        chosen = numbers[index]
    if stored.float8:
        return chosen.contiguous().view(torch.float8_e4m3fn)
    if stored.multiplier is None:
        return chosen
    grouped = chosen.unflatten(1, (-1, stored.group)).float() * stored.multiplier[:, :, None].float() / 255
    return grouped.round().flatten(1).to(torch.int8)


def weight_meaning(stored: StoredWeight) -> Tensor:
    """The weight float32 [O, I] that is meant."""
    carrier = carrier_meaning(stored).float()
    if stored.scale.dim() == 1:
        return carrier * stored.scale[:, None]
    return (carrier.unflatten(1, (-1, stored.group)) * stored.scale[:, :, None]).flatten(1)
