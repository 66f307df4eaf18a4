"""The kinds of rotation that an input can get, by name: how each is made, and what it costs at run time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditq.numerics.rotation import (
    Rotation,
    block_hadamard_rotation,
    hadamard_rotation,
    outlier_rotation,
    regular_block,
    regular_rotation,
)


@dataclass(frozen=True)
class Making:
    """What a kind may depend on besides the input: channels of a block, permutation of `outlier`, seed."""

    block: int = 64
    permutation: str = "stride"
    seed: int = 0


# From cheapest to dearest in time: by products and permutations that read and write the whole input, then by their size.
# Each makes its rotation of sampled rows [n, C]; those that look at nothing but C take no rows.
KINDS: dict[str, Callable[[Tensor, Making], Rotation | None]] = {
    "identity": lambda rows, making: None,
    "block_hadamard": lambda rows, making: block_hadamard_rotation(
        rows.shape[1], math.gcd(rows.shape[1], making.block), making.seed
    ),
    "regular": lambda rows, making: regular_rotation(rows.shape[1], regular_block(rows.shape[1], making.block)),
    "hadamard": lambda rows, making: hadamard_rotation(rows.shape[1], making.seed),
    "outlier": lambda rows, making: outlier_rotation(rows, permutation=making.permutation, seed=making.seed),
}
DATA_FREE = ("identity", "block_hadamard", "regular", "hadamard")


def multiply_adds(kind: str, width: int, making: Making) -> int:
    """Multiply-adds a token of a kind on that many channels.

    Raises:
        ValueError: when there is no such rotation of this width.
    """
    if kind == "outlier":
        block = max(b for b in range(1, min(128, width) + 1) if width % b == 0)
        if block < 2:
            raise ValueError(f"{width} channels cannot be cut into blocks")
        return 2 * width * block
    rotation = KINDS[kind](torch.empty(0, width), making)
    return 0 if rotation is None else rotation.multiply_adds()
