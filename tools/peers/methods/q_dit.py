"""Q-DiT (Chen et al., arXiv 2406.17343): groups of input channels with zero points, for weights (GPTQ) and for
activations.

    s = (max - min) / (2^b - 1),  z = -round(min / s)      for every run of `group` columns, and of a token's channels

Groups of 64 for every linear: the authors' 128 does not divide the small checkpoints' width of 192, 64 is among the
sizes that they search. Not included: the evolutionary search of a group size for each linear (its fitness is the FID
of 800 pictures a candidate).
"""

from __future__ import annotations

from functools import partial

from tools.peers.bench import Bench
from tools.peers.grids import gptq, uniform_grid
from tools.peers.layers import PeerLinear, asymmetric
from tools.peers.row import Outcome, add

GROUP = 64


def apply(bench: Bench, bits: int, activation: int) -> Outcome:
    stored = {}
    for inputs, linears in bench.groups():
        hessian = bench.inputs(inputs).hessian()
        for site, linear in zip(inputs.sites, linears, strict=True):
            weight = linear.weight.float()
            grid = uniform_grid(weight, bits, GROUP, symmetric=False)
            stored[site] = grid.stored_bits()
            layer = PeerLinear(gptq(weight, hessian, grid), linear.bias, asymmetric(activation, GROUP))
            bench.graph.replace(site, layer)
    return Outcome(bench.graph.model, stored)


for _bits, _activation in ((6, 8), (4, 8), (3, 8)):
    add(f"Q-DiT w{_bits}a{_activation} g{GROUP}", "Q-DiT", _activation,
        partial(apply, bits=_bits, activation=_activation))  # fmt: skip
