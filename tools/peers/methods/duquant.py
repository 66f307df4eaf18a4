"""DuQuant (Lin et al., arXiv 2406.01721): smoothing, a rotation, a zigzag permutation, a second rotation,
round-to-nearest.

    G = diag(1/s) R1 P R2,   y = (x G)(W G^-T)^T

R1 and R2 are one block each, found greedily on sampled inputs (256 steps; 128 channels, or the largest divisor of the
width below); s by largest magnitudes with alpha 0.6; weights a row and activations a token with zero points, clipped
to 0.8 and 0.9 of their range, as in the authors' command lines for 4 bits. At 8 bits nothing is clipped.
"""

from __future__ import annotations

from functools import partial

from ditq.numerics.rotation import PermuteStep, Rotation, outlier_rotation
from tools.peers.bench import Bench
from tools.peers.grids import nearest, uniform_grid
from tools.peers.layers import PeerLinear, asymmetric, chain, scaled, smoothing, stacked_weight
from tools.peers.row import Outcome, add

ALPHA, WEIGHT_CLIP, ACTIVATION_CLIP = 0.6, 0.8, 0.9


def apply(bench: Bench, bits: int, activation: int) -> Outcome:
    stored, online = {}, {}
    for inputs, linears in bench.groups():
        statistics = bench.inputs(inputs)
        scale = smoothing(statistics.absmax_all, stacked_weight(linears).abs().amax(0), ALPHA)
        rotation = outlier_rotation(statistics.sample / scale, permutation="zigzag")
        online[inputs.sites[0]] = rotation_bits(rotation) + (16 * inputs.width if inputs.feed is None else 0)
        before = chain(scaled(1 / scale), rotation.apply)
        act = asymmetric(activation, clip=ACTIVATION_CLIP if activation <= 4 else 1.0)
        for site, linear in zip(inputs.sites, linears, strict=True):
            weight = rotation.right_multiply(linear.weight.float() * scale)
            grid = uniform_grid(weight, bits, symmetric=False, clip=WEIGHT_CLIP if bits <= 4 else 1.0)
            stored[site] = grid.stored_bits()
            bench.graph.replace(site, PeerLinear(nearest(weight, grid), linear.bias, act, before))
    return Outcome(bench.graph.model, stored, online)


def rotation_bits(rotation: Rotation) -> int:
    """What a rotation found from data takes: matrices in half precision, permutations in 16 bits an index."""
    return 16 * sum(s.index.numel() if isinstance(s, PermuteStep) else s.matrix.numel() for s in rotation.steps)


for _bits, _activation in ((8, 8), (4, 8), (4, 4)):
    add(f"DuQuant w{_bits}a{_activation}", "DuQuant", _activation, partial(apply, bits=_bits, activation=_activation))
