"""SVDQuant (Li et al., arXiv 2411.05007): smoothing, a low-rank branch in half precision, the rest in int4 by groups.

    x^ = x / lambda,  W^ = W lambda,  W^ ~ L1 L2 + Q(W^ - L1 L2),  y = x^ L1 L2 + Q(x^) Q(W^ - L1 L2)

As in the authors' code (deepcompressor): lambda = a^alpha / w^beta by largest magnitudes, searched on a grid of 39 by
the output error with the branch in place; the branch and the rounding are alternated up to 100 times while the output
error falls; all linears of an input share the branch's first factor; inputs behind GELU are shifted and quantized
without sign; modulation is int4 in groups of 64, weights only. At the small checkpoints' width of 192 a rank of 32
costs 3 bits a weight; `rank 2` is the same share of the width as 32 of 3072.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditq.calibration.input_statistics import InputStatistics
from ditq.graph import DiTGraph
from ditq.numerics.rounding import output_error
from ditq.parts import InputGroup
from tools.peers.bench import Bench
from tools.peers.grids import gptq, nearest, uniform_grid
from tools.peers.layers import Map, PeerLinear, per_group, scaled, stacked_weight
from tools.peers.row import Outcome, add

GROUP, BITS = 64, 4
SHIFT = 0.171875  # GELU never goes below -0.17
ROUNDS = 100
ROWS = 256


def apply(bench: Bench, rank: int, with_gptq: bool) -> Outcome:
    stored: dict[str, float] = {}
    online: dict[str, float] = {}
    for inputs, linears in bench.groups():
        statistics = bench.inputs(inputs)
        weight = stacked_weight(linears)
        unsigned = behind_gelu(bench.graph, inputs)
        scale = search_scale(weight, statistics, rank, unsigned)
        smoothed = weight * scale
        hessian = statistics.transformed(inverse_scale=1 / scale).hessian()
        first, second, rounded = alternate(smoothed, hessian, rank)
        if with_gptq:
            residual = smoothed - (first @ second).T
            rounded = gptq(residual, hessian, uniform_grid(residual, BITS, GROUP))
        act, start = activation(unsigned, scale), 0
        branch = 16 * rank * (inputs.width + len(weight)) / len(weight)  # a row
        for site, linear in zip(inputs.sites, linears, strict=True):
            rows = slice(start, start + linear.out_features)
            start = rows.stop
            grid = uniform_grid(rounded[rows], BITS, GROUP)
            stored[site] = grid.stored_bits() + branch * linear.out_features
            low_rank = (first, second[:, rows])
            layer = PeerLinear(rounded[rows], linear.bias, act, scaled(1 / scale), low_rank)
            bench.graph.replace(site, layer)
        if inputs.feed is None:
            online[inputs.sites[0]] = 16 * inputs.width
    for site in bench.modulation_sites:
        plain: Any = bench.graph.linear(site)
        grid = uniform_grid(plain.weight, BITS, GROUP)
        stored[site] = grid.stored_bits()
        bench.graph.replace(site, PeerLinear(nearest(plain.weight, grid), plain.bias))
    return Outcome(bench.graph.model, stored, online)


def behind_gelu(graph: DiTGraph, inputs: InputGroup) -> Tensor:
    """Which channels of an input come out of a GELU: bool [I]."""
    found = torch.zeros(inputs.width, dtype=torch.bool)
    for item in graph.feed_forwards.values():
        if item.output.site in inputs.sites and "gelu" in item.activation.lower():
            found[item.output.start : item.output.stop] = True
    return found


def activation(unsigned: Tensor, scale: Tensor) -> Map:
    """int4 by groups of 64 channels, with a sign or, shifted, without."""
    signed = per_group(BITS, GROUP)
    assert signed is not None
    if not bool(unsigned.any()):
        return signed
    shift = torch.where(unsigned, SHIFT / scale, 0.0)
    limit = (1 << BITS) - 1

    def quantize(x: Tensor) -> Tensor:
        moved = (x + shift).unflatten(-1, (-1, GROUP))
        step = (moved.amax(-1, keepdim=True) / limit).clamp_min(1e-8)
        return torch.where(unsigned, ((moved / step).round().clamp(0, limit) * step).flatten(-2) - shift, signed(x))

    return quantize


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of W^T [I, O]: (first [I, r], second [r, O]), rounded to half precision."""
    u, s, v = torch.linalg.svd(weight.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).half().float(), (root[:, None] * v[:rank]).half().float()


def alternate(weight: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Branch and rounded rest of least output error: (first, second, rounded)."""
    rounded, best, least = torch.zeros_like(weight), None, float("inf")
    for _ in range(ROUNDS):
        first, second = low_rank(weight - rounded, rank)
        residual = weight - (first @ second).T
        rounded = nearest(residual, uniform_grid(residual, BITS, GROUP))
        error = output_error(weight, rounded + (first @ second).T, hessian)
        if error >= least:
            break
        best, least = (first, second, rounded), error
    assert best is not None
    return best


def candidates(largest_input: Tensor, largest_weight: Tensor) -> Iterator[Tensor]:
    """1, then a^(i/20) and a^(i/20) / w^(1 - i/20) for i = 1 .. 19."""
    yield torch.ones_like(largest_input)
    a, w = largest_input.clamp_min(1e-5), largest_weight.clamp_min(1e-5)
    for step in range(1, 20):
        share = step / 20
        yield a**share
        yield a**share / w ** (1 - share)


def search_scale(weight: Tensor, statistics: InputStatistics, rank: int, unsigned: Tensor) -> Tensor:
    sample = statistics.sample
    x = sample[:: max(1, len(sample) // ROWS)][:ROWS]
    reference, best, least = x @ weight.T, torch.ones(weight.shape[1]), float("inf")
    for scale in candidates(statistics.absmax_all, weight.abs().amax(0)):
        smoothed, x_hat = weight * scale, x / scale
        first, second = low_rank(smoothed, rank)
        residual = smoothed - (first @ second).T
        rounded = nearest(residual, uniform_grid(residual, BITS, GROUP))
        y = activation(unsigned, scale)(x_hat) @ rounded.T + x_hat @ first @ second
        error = float((y - reference).square().sum())
        if error < least:
            best, least = scale, error
    return best


for _rank in (32, 2):
    for _gptq in (False, True):
        add(f"SVDQuant{'+GPTQ' if _gptq else ''} w4a4 g64 rank {_rank}", "SVDQuant", 4,
            partial(apply, rank=_rank, with_gptq=_gptq))  # fmt: skip
