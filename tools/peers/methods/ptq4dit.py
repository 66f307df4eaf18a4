"""PTQ4DiT (Wu et al., arXiv 2405.16005): salience balancing between inputs and weights, its salience weighted over
the steps.

    s(x) = sum_t eta_t max|x^(t)|,  eta = softmax_t(-rho_t),  rho_t Spearman's correlation of max|x^(t)| and max|w|
    x' = x b,  W' = W / b,  b_j = sqrt(s(x_j) s(w_j)) / s(x_j)

Balanced are inputs behind adaLN (folded there) and those of the attention's output linear, as in the paper;
feed-forward outputs are not. Weights a row, activations one static range for the whole input, both with zero points
and the range of least error (norm 2.4), as Q-Diffusion sets them. The steps are the calibration's bins. Not included:
the reconstruction of blocks by 20,000 steps of gradient descent, which learns the rounding; the rows with GPTQ have a
rounding by output error in its place.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tools.peers.bench import Bench
from tools.peers.grids import gptq, nearest, uniform_grid
from tools.peers.layers import PeerLinear, scaled, stacked_weight, static
from tools.peers.row import Outcome, add


def apply(bench: Bench, bits: int, activation: int, with_gptq: bool) -> Outcome:
    stored = {}
    for inputs, linears in bench.groups():
        statistics = bench.inputs(inputs)
        kinds = {bench.graph.sites[site].kind for site in inputs.sites}
        balanced = inputs.feed is not None or kinds == {"attention_out"}
        factor = torch.ones(inputs.width)
        if balanced:
            factor = balance(statistics.absmax, stacked_weight(linears).abs().amax(0))
        hessian = statistics.transformed(inverse_scale=factor).hessian()
        low, high = static_range(statistics.sample * factor, activation)
        for site, linear in zip(inputs.sites, linears, strict=True):
            weight = linear.weight.float() / factor
            grid = uniform_grid(weight, bits, symmetric=False, norm=2.4)
            stored[site] = grid.stored_bits()
            rounded = gptq(weight, hessian, grid) if with_gptq else nearest(weight, grid)
            bench.graph.replace(site, PeerLinear(rounded, linear.bias, static(activation, low, high), scaled(factor)))
    return Outcome(bench.graph.model, stored)


def balance(absmax: Tensor, weight: Tensor) -> Tensor:
    """absmax [T, I] of the steps, weight [I] -> b [I]."""
    absmax, weight = absmax.clamp_min(1e-5), weight.clamp_min(1e-5)
    rho = torch.stack([spearman(step, weight) for step in absmax])
    salience = (torch.softmax(-rho, 0)[:, None] * absmax).sum(0)
    return (salience * weight).sqrt() / salience


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the ranks of two vectors."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].float()


def static_range(sample: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The share of [min, max] with the least error of norm 2.4 on sampled inputs."""
    low, high = sample.min().clamp_max(0), sample.max().clamp_min(0)
    best, least = (low, high), float("inf")
    for step in range(80):
        share = 1 - step / 100
        candidate = (low * share, high * share)
        error = float((static(bits, *candidate)(sample) - sample).abs().pow(2.4).mean())
        if error < least:
            best, least = candidate, error
    return best


for _bits, _gptq in ((8, False), (4, False), (4, True)):
    add(f"PTQ4DiT balancing{', GPTQ' if _gptq else ''} w{_bits}a8", "PTQ4DiT", 8,
        partial(apply, bits=_bits, activation=8, with_gptq=_gptq))  # fmt: skip
