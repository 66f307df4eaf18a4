"""Packing: b-bit codes, one a byte, to and from the dense bytes that are written to disk.

Three layouts, by bits:
  8     the codes themselves, [O, I]
  4     two codes a byte, [O, ceil(I/2)]: the even column in the low nibble, the odd column in the high one
  else  bit planes, [bits, O, ceil(I/8)]: plane p holds bit p of every code; bit j of byte k is column 8k + j
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """The shape of `pack` of codes [rows, columns]."""
    _check_bits(bits)
    if bits == 8:
        return (rows, columns)
    if bits == 4:
        return (rows, -(-columns // 2))
    return (bits, rows, -(-columns // 8))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [O, I], each below 2^bits, to packed uint8 (shape: `packed_shape`). Padding codes are zero.

    Raises:
        ValueError: for another dtype or rank, bits outside 1..8, or a code that needs more bits.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes are uint8 [rows, columns], not {codes.dtype} {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes
    columns = codes.shape[1]
    if bits == 4:
        even = pad(codes, (0, columns % 2))
        return even[:, 0::2] | (even[:, 1::2] << 4)
    octets = pad(codes, (0, -columns % 8)).unflatten(1, (-1, 8))
    planes = torch.zeros(bits, *octets.shape[:2], dtype=torch.uint8, device=codes.device)
    for plane in range(bits):
        for j in range(8):
            planes[plane] |= ((octets[:, :, j] >> plane) & 1) << j
    return planes


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes uint8 [O, columns] that `pack` packed.

    Raises:
        ValueError: when the packed shape does not belong to that many bits and columns.
    """
    _check_bits(bits)
    rows = packed.shape[-2] if packed.dim() >= 2 else 0
    if packed.dtype != torch.uint8 or tuple(packed.shape) != packed_shape(rows, columns, bits):
        raise ValueError(f"{packed.dtype} {list(packed.shape)} does not hold {columns} columns of {bits}-bit codes")
    if bits == 8:
        return packed
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        return codes[:, :columns].contiguous()
    codes = torch.zeros(*packed.shape[1:], 8, dtype=torch.uint8, device=packed.device)
    for plane in range(bits):
        for j in range(8):
            codes[:, :, j] |= ((packed[plane] >> j) & 1) << plane
    return codes.flatten(1)[:, :columns].contiguous()
