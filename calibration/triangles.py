"""Symmetric matrices on disk: only what is on and above the diagonal, half of what they take in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_BAND = 128


def packed(matrices: Tensor) -> Tensor:
    """Symmetric [M, C, C] -> their upper triangles row after row [M, C (C + 1) / 2]."""
    return torch.stack([torch.cat([row[place:] for place, row in enumerate(matrix)]) for matrix in matrices])


def unpacked(triangles: Tensor, width: int) -> Tensor:
    """[M, C (C + 1) / 2] -> symmetric [M, C, C], `width` being C."""
    matrices = triangles.new_zeros(len(triangles), width, width)
    sizes = list(range(width, 0, -1))
    for matrix, triangle in zip(matrices, triangles, strict=True):
        for place, part in enumerate(triangle.split(sizes)):
            matrix[place, place:] = part
        for start in range(0, width, _BAND):  # below the diagonal, in pieces that a processor's cache holds
            for left in range(start, width, _BAND):
                above = matrix[start : start + _BAND, left : left + _BAND]
                if left == start:
                    above += above.triu(1).mT
                else:
                    matrix[left : left + _BAND, start : start + _BAND] = above.mT
    return matrices
