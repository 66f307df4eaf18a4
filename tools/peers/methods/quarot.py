"""QuaRot (Ashkboos et al., arXiv 2404.00456) with GPTQ weights, as far as it goes in a transformer with modulation.

The rotation of the residual stream cannot be folded behind adaLN, so every input gets its Hadamard rotation online,
the attention outputs' one over all heads included. Weights: symmetric a row, range searched with norm 2.4, GPTQ.
Activations: symmetric a token; at 4 bits clipped to 0.9, as in the authors' command line.
"""

from __future__ import annotations

from functools import partial

from ditq.numerics.rotation import hadamard_rotation
from tools.peers.bench import Bench
from tools.peers.grids import gptq, uniform_grid
from tools.peers.layers import PeerLinear, per_token
from tools.peers.row import Outcome, add


def apply(bench: Bench, bits: int, activation: int) -> Outcome:
    stored = {}
    for inputs, linears in bench.groups():
        statistics = bench.inputs(inputs)
        rotation = hadamard_rotation(inputs.width)
        hessian = statistics.transformed(rotations=[(0, inputs.width, rotation)]).hessian()
        act = per_token(activation, clip=0.9 if activation <= 4 else 1.0)
        for site, linear in zip(inputs.sites, linears, strict=True):
            weight = rotation.right_multiply(linear.weight.float())
            grid = uniform_grid(weight, bits, norm=2.4)
            stored[site] = grid.stored_bits()
            bench.graph.replace(site, PeerLinear(gptq(weight, hessian, grid), linear.bias, act, rotation.apply))
    return Outcome(bench.graph.model, stored)


for _bits, _activation in ((8, 8), (4, 8), (4, 4), (3, 8), (4, 16)):
    add(
        f"QuaRot-GPTQ w{_bits}a{_activation}", "QuaRot", _activation, partial(apply, bits=_bits, activation=_activation)
    )
