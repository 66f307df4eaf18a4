"""Plain round-to-nearest, symmetric: by the largest weight of a row (or group), or with its range clipped at least MSE."""

from __future__ import annotations

from functools import partial

from tools.peers.bench import Bench
from tools.peers.grids import nearest, uniform_grid
from tools.peers.layers import PeerLinear, per_token
from tools.peers.row import Outcome, add


def apply(bench: Bench, bits: int, activation: int, group: int | None, clipped: bool) -> Outcome:
    stored = {}
    for inputs, linears in bench.groups():
        for site, linear in zip(inputs.sites, linears, strict=True):
            grid = uniform_grid(linear.weight, bits, group, norm=2.0 if clipped else None)
            stored[site] = grid.stored_bits()
            bench.graph.replace(site, PeerLinear(nearest(linear.weight, grid), linear.bias, per_token(activation)))
    return Outcome(bench.graph.model, stored)


for _form in ((8, 8), (6, 8), (4, 16), (4, 8), (4, 4), (3, 8)):
    for _clipped in (False, True):
        if _clipped and _form[0] > 4:
            continue
        _name = f"round-to-nearest{', MSE-clipped' if _clipped else ''} w{_form[0]}a{_form[1]}"
        add(_name, "round-to-nearest", _form[1], partial(apply, bits=_form[0], activation=_form[1], group=None,
                                                         clipped=_clipped))  # fmt: skip
add("round-to-nearest, MSE-clipped w4a16 g64", "round-to-nearest", 16,
    partial(apply, bits=4, activation=16, group=64, clipped=True))  # fmt: skip
