"""Rotations: orthogonal R as a few cheap steps, so that (x R)(W R)^T = x W^T at a fraction of a dense product's cost.

A rotation spreads a few large channels over many, which makes activations and weights easier to quantize. It stands
between smoothing and the codebook in the path of a weight; the export turns its steps into Reshape, MatMul, Transpose.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from ditq.numerics.hadamard import (
    hadamard,
    is_hadamard_order,
    is_regular_order,
    regular_hadamard,
    two_factors,
)

_ROWS_AT_ONCE = 1 << 22  # elements of a weight that are widened to float64 at a time


@dataclass(frozen=True, eq=False)
class BlockStep:
    """y = x (I x M): every run of b channels is multiplied by the same matrix M float64 [b, b]."""

    matrix: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.matrix.to(device=x.device, dtype=x.dtype)
        return (x.unflatten(-1, (-1, matrix.shape[0])) @ matrix).flatten(-2)


@dataclass(frozen=True, eq=False)
class HeadsStep:
    """y = x blockdiag(M_1 .. M_h): every head its own matrix, float64 [h, b, b]. Only for what is folded offline."""

    matrix: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.matrix.to(device=x.device, dtype=x.dtype)
        heads, width = matrix.shape[:2]
        return torch.einsum("...hd,hde->...he", x.unflatten(-1, (heads, width)), matrix).flatten(-2)


@dataclass(frozen=True, eq=False)
class PermuteStep:
    """y = x[..., index]. `stride` (a, b): the same as x.reshape(..., a, b).transpose(-1, -2).reshape(...)."""

    index: torch.Tensor
    stride: tuple[int, int] | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride is not None:
            return x.unflatten(-1, self.stride).transpose(-1, -2).flatten(-2)
        return x[..., self.index.to(x.device)]


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix R [size, size] = the product of its steps.

    `recipe` is how a data-free rotation was made; it is then remade from that alone. None: its tensors are its spec.
    """

    size: int
    steps: tuple[BlockStep | PermuteStep | HeadsStep, ...]
    recipe: dict[str, Any] | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> x R, computed in x's dtype."""
        if x.shape[-1] != self.size:
            raise ValueError(f"a rotation of {self.size} channels cannot take {x.shape[-1]}")
        for step in self.steps:
            x = step.apply(x)
        return x

    def matrix(self) -> torch.Tensor:
        """R as a dense float64 [size, size]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def right_multiply(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [O, size] -> W R, computed in float64 and returned in the weight's dtype."""
        rows = max(1, _ROWS_AT_ONCE // self.size)
        return torch.cat([self.apply(part.double()).to(weight.dtype) for part in weight.split(rows)])

    def multiply_adds(self) -> int:
        """Multiply-adds a token."""
        return sum(self.size * step.matrix.shape[0] for step in self.steps if isinstance(step, BlockStep))

    def spec(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(what goes into JSON, what goes beside it as tensors); the tensors are empty for a data-free rotation.

        Raises:
            ValueError: for a rotation by heads, which is only ever folded.
        """
        if self.recipe is not None:
            return dict(self.recipe), {}
        kinds, tensors = [], {}
        for position, step in enumerate(self.steps):
            if isinstance(step, HeadsStep):
                raise ValueError("a rotation by heads is folded offline and has no description")
            kinds.append("block" if isinstance(step, BlockStep) else "permute")
            tensors[f"{position}.{kinds[-1]}"] = step.matrix if isinstance(step, BlockStep) else step.index
        return {"kind": "steps", "size": self.size, "steps": kinds}, tensors

    @staticmethod
    def from_spec(spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Rotation:
        """The rotation that `spec` described.

        Raises:
            ValueError: for a kind that is not known, or tensors that are missing or of the wrong shape.
        """
        kind, size = spec.get("kind"), spec.get("size", 0)
        if kind == "hadamard":
            return hadamard_rotation(size, spec["seed"])
        if kind == "block_hadamard":
            return block_hadamard_rotation(size, spec["block"], spec["seed"])
        if kind == "regular_hadamard":
            return regular_rotation(size, spec["block"])
        if kind != "steps":
            raise ValueError(f"unknown kind of rotation: {kind!r}")
        steps: list[BlockStep | PermuteStep | HeadsStep] = []
        for position, step in enumerate(spec["steps"]):
            tensor = tensors.get(f"{position}.{step}")
            if tensor is None:
                raise ValueError(f"the rotation's tensor '{position}.{step}' is missing")
            if step == "permute":
                if sorted(tensor.tolist()) != list(range(size)):
                    raise ValueError(f"the rotation's tensor '{position}.permute' is no permutation of {size} channels")
                steps.append(PermuteStep(tensor))
            elif tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] and size % tensor.shape[0] == 0:
                steps.append(BlockStep(tensor))
            else:
                raise ValueError(f"the rotation's tensor '{position}.{step}' {list(tensor.shape)} does not fit {size}")
        return Rotation(size, tuple(steps))


def _random_signs(count: int, seed: int) -> torch.Tensor:
    """+1 and -1, float64 [count], by SplitMix64: the same in every version of every library, as an engine needs."""
    mask = (1 << 64) - 1
    state, signs = seed & mask, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        signs.append(1.0 if (z ^ (z >> 31)) & 1 else -1.0)
    return torch.tensor(signs, dtype=torch.float64)


def _signed_hadamard(n: int, seed: int) -> torch.Tensor:
    """diag(s) H / sqrt(n), float64 [n, n], with random signs s.

    Without signs, a matrix such as Sylvester's sends an offset that all channels share into one single channel. The
    signs are the draw out of 64 that sends it the most evenly: the least max|1^T diag(s) H|.
    """
    h = hadamard(n)
    draws = torch.stack([_random_signs(n, seed * 64 + draw) for draw in range(64)])
    flattest = int((draws @ h).abs().amax(dim=1).argmin())
    return draws[flattest][:, None] * h / math.sqrt(n)


def hadamard_rotation(n: int, seed: int = 0) -> Rotation:
    """The full random Hadamard rotation, as two factors: R = (D_a H_a x D_b H_b) P / sqrt(n), P the stride permutation.

    Two block products and one transpose (QuaRot, arXiv 2404.00456, section 3, with the Kronecker form kept apart). The
    permutation P would be undone at the end; it only renames channels, so it is left in and is a part of R.

    Raises:
        ValueError: when n is not a Hadamard order.
    """
    a, b = two_factors(n)
    recipe = {"kind": "hadamard", "size": n, "seed": seed}
    if a == 1:
        return Rotation(n, (BlockStep(_signed_hadamard(n, 2 * seed)),), recipe)
    stride = PermuteStep(torch.arange(n).reshape(a, b).T.flatten(), stride=(a, b))
    steps = (BlockStep(_signed_hadamard(b, 2 * seed)), stride, BlockStep(_signed_hadamard(a, 2 * seed + 1)))
    return Rotation(n, steps, recipe)


def block_hadamard_rotation(n: int, block: int | None = None, seed: int = 0) -> Rotation:
    """The same random Hadamard matrix on every run of `block` channels: R = I x (D H / sqrt(block)).

    block: by default the largest power of two that divides n, at most 128.

    Raises:
        ValueError: when the block does not divide n or is not a Hadamard order above 1.
    """
    block = math.gcd(n, 128) if block is None else block
    if block < 2 or n % block or not is_hadamard_order(block):
        raise ValueError(f"{n} channels cannot be rotated in Hadamard blocks of {block}")
    recipe = {"kind": "block_hadamard", "size": n, "block": block, "seed": seed}
    return Rotation(n, (BlockStep(_signed_hadamard(block, 2 * seed)),), recipe)


def regular_block(n: int, block: int = 64) -> int:
    """The largest order of a regular Hadamard matrix that divides n, at most `block`; 1 if there is none."""
    return max(b for b in range(1, min(block, n) + 1) if n % b == 0 and is_regular_order(b))


def regular_rotation(n: int, block: int = 64) -> Rotation:
    """The same regular Hadamard matrix on every run of `block` channels: R = I x (H / sqrt(block)), all row sums equal.

    An offset that all channels share stays exactly as it is, where random signs leave up to about twice it in some channel;
    no random numbers are needed (ConvRot, arXiv 2512.03673).

    Raises:
        ValueError: when the block does not divide n or has no regular Hadamard matrix here.
    """
    if block < 2 or n % block or not is_regular_order(block):
        raise ValueError(f"{n} channels cannot be rotated in regular Hadamard blocks of {block}")
    recipe = {"kind": "regular_hadamard", "size": n, "block": block}
    return Rotation(n, (BlockStep(regular_hadamard(block) / math.sqrt(block)),), recipe)


def head_block(head_dim: int) -> int:
    """The largest Hadamard order that divides a head's channels; 1 if they are odd in number."""
    return max(b for b in range(1, head_dim + 1) if head_dim % b == 0 and is_hadamard_order(b))


def head_rotation(n: int, head_dim: int, seed: int = 0) -> Rotation:
    """One Hadamard rotation for every attention head: it folds into the value and output projections, offline.

    A head whose width is no Hadamard order is rotated in blocks of `head_block`.

    Raises:
        ValueError: heads of an odd number of channels.
    """
    return block_hadamard_rotation(n, head_block(head_dim), seed)


@functools.lru_cache(maxsize=4)
def _givens_chain(n: int) -> torch.Tensor:
    """A chain of n - 1 Givens rotations, float64 [n, n], whose first row is uniform: it spreads channel 0 evenly.

    DuQuant (arXiv 2406.01721, section 3.2). Turn i leaves 1/sqrt(n) of channel 0 in column i and hands on the rest.
    """
    chain = torch.eye(n, dtype=torch.float64)
    for i in range(n - 1):
        cos, sin = 1 / math.sqrt(n - i), math.sqrt(n - i - 1) / math.sqrt(n - i)
        left, right = chain[:, i].clone(), chain[:, i + 1].clone()
        chain[:, i] = cos * left - sin * right
        chain[:, i + 1] = sin * left + cos * right
    return chain


def _spreading_rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """The Givens chain after a random orthogonal matrix on all channels but the first, float64 [n, n]."""
    random, triangle = torch.linalg.qr(torch.randn(n - 1, n - 1, dtype=torch.float64, generator=generator))
    chain = _givens_chain(n)
    return torch.cat((chain[:1], (random * triangle.diagonal().sign()) @ chain[1:]))


def _greedy_rotation(blocks: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
    """DuQuant's greedy search: in each step spread the channel that holds the peak; keep the best prefix of steps.

    blocks float64 [rows, b] -> orthogonal float64 [b, b] with max|blocks R| <= max|blocks|.
    """
    size = blocks.shape[1]
    total = torch.eye(size, dtype=torch.float64)
    best, best_peak = total, float(blocks.abs().max())
    for _ in range(steps):
        channel = int(blocks.abs().amax(dim=0).argmax())
        swap = torch.arange(size)
        swap[0], swap[channel] = channel, 0
        rotation = _spreading_rotation(size, generator)[swap][:, swap]
        blocks, total = blocks @ rotation, total @ rotation
        peak = float(blocks.abs().max())
        if peak < best_peak:
            best, best_peak = total, peak
    return best


def _telling_blocks(x: torch.Tensor, block: int, count: int = 2048) -> torch.Tensor:
    """The rows of all blocks [<= count, block] that can hold the peak: the largest by max|x| and by 2-norm.

    A rotation keeps the norm, so a row of a small norm can never hold the peak afterwards.
    """
    rows = x.reshape(-1, block)
    if rows.shape[0] <= count:
        return rows
    by_peak = rows.abs().amax(dim=1).topk(count // 2).indices
    by_norm = rows.norm(dim=1).topk(count // 2).indices
    return rows[torch.cat((by_peak, by_norm)).unique()]


def _zigzag(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """DuQuant's permutation: channels by max|x|, dealt to the blocks forward, then backward, and so on."""
    order = x.abs().amax(dim=0).argsort(descending=True, stable=True).reshape(-1, blocks)
    order[1::2] = order[1::2].flip(1)
    return order.T.flatten()


def _stride(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """LRQ-DiT's permutation: channels by range, block j taking every `blocks`-th from the j-th on."""
    spread = x.amax(dim=0) - x.amin(dim=0)
    return spread.argsort(descending=True, stable=True).reshape(-1, blocks).T.flatten()


_PERMUTATIONS = {"zigzag": _zigzag, "stride": _stride}


def outlier_rotation(
    sample: torch.Tensor,
    block: int = 128,
    steps: int = 256,
    permutation: str = "stride",
    seed: int = 0,
) -> Rotation:
    """The two-step rotation R1 P R2 of DuQuant (arXiv 2406.01721) and LRQ-DiT (arXiv 2508.03485), from a sample.

    sample [rows, n]: the layer's input. R1 and R2 are one [block, block] matrix each, shared by all blocks and found
    greedily; P evens out the blocks between them. A width that `block` does not divide takes its largest divisor below.

    Raises:
        ValueError: for an unknown permutation, a sample that is not finite [rows, n], or a width without a divisor.
    """
    if permutation not in _PERMUTATIONS:
        raise ValueError(f"unknown permutation {permutation!r}: one of {', '.join(_PERMUTATIONS)}")
    if sample.dim() != 2 or not sample.numel() or not bool(sample.isfinite().all()):
        raise ValueError("an outlier rotation needs a finite sample [rows, channels]")
    n = sample.shape[1]
    block = max(b for b in range(1, min(block, n) + 1) if n % b == 0)
    if block < 2:
        raise ValueError(f"{n} channels cannot be cut into blocks")
    x = sample.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    first = BlockStep(_greedy_rotation(_telling_blocks(x, block), steps, generator))
    x = first.apply(x)
    permute = PermuteStep(_PERMUTATIONS[permutation](x, n // block))
    x = permute.apply(x)
    second = BlockStep(_greedy_rotation(_telling_blocks(x, block), steps, generator))
    return Rotation(n, (first, permute, second))
