"""ViDiT-Q (Zhao et al., arXiv 2406.02540): static scaling, then a Hadamard rotation, per-token dynamic activations.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),  x' = (x / s) H,  W' = (W s) H

alpha 0.3 (the authors' PixArt configuration), largest inputs of the first steps, where channels differ most; weights
min-max a row, activations min-max a token, both with zero points. Not included: the mixed precision that is searched
by metric; every linear has the same bits.
"""

from __future__ import annotations

from functools import partial

from ditq.numerics.rotation import hadamard_rotation
from tools.peers.bench import Bench
from tools.peers.grids import nearest, uniform_grid
from tools.peers.layers import PeerLinear, asymmetric, chain, scaled, smoothing, stacked_weight
from tools.peers.row import Outcome, add

ALPHA = 0.3


def apply(bench: Bench, bits: int, activation: int) -> Outcome:
    stored, online = {}, {}
    for inputs, linears in bench.groups():
        largest = bench.inputs(inputs).absmax[0]  # the first bin of steps
        scale = smoothing(largest, stacked_weight(linears).abs().amax(0), ALPHA)
        rotation = hadamard_rotation(inputs.width)
        before = chain(scaled(1 / scale), rotation.apply)
        for site, linear in zip(inputs.sites, linears, strict=True):
            weight = rotation.right_multiply(linear.weight.float() * scale)
            grid = uniform_grid(weight, bits, symmetric=False)
            stored[site] = grid.stored_bits()
            layer = PeerLinear(nearest(weight, grid), linear.bias, asymmetric(activation), before)
            bench.graph.replace(site, layer)
        if inputs.feed is None:
            online[inputs.sites[0]] = 16 * inputs.width
    return Outcome(bench.graph.model, stored, online)


for _bits, _activation in ((8, 8), (6, 6), (4, 8), (4, 4)):
    add(f"ViDiT-Q w{_bits}a{_activation}", "ViDiT-Q", _activation, partial(apply, bits=_bits, activation=_activation))
