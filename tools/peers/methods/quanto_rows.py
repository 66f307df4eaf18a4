"""optimum-quanto by its own `quantize`, `Calibration` and `freeze`, on the token linears.

qint4 and qint2 have a scale and a shift for each group of 128 columns, or the next smaller multiple of 32 that
divides the width. Where activations are quantized, they have one calibrated scale a tensor, outputs of linears as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.peers.bench import Bench
from tools.peers.row import Outcome, add


def apply(bench: Bench, weights: str, activations: str | None, bits: int) -> Outcome:
    from optimum import quanto

    model: Any = bench.graph.model
    quanto.quantize(
        model,
        weights=getattr(quanto, weights),
        activations=None if activations is None else getattr(quanto, activations),
        include=bench.token_sites,
    )
    if activations is not None:
        with quanto.Calibration():
            for call in bench.calibration_calls():
                model(**call)
    quanto.freeze(model)
    stored = {}
    for site in bench.token_sites:
        weight = model.get_submodule(site).weight
        shift = getattr(weight, "_shift", None)
        extra = weight._scale.numel() + (0 if shift is None else shift.numel())
        stored[site] = bench.graph.sites[site].parameters * bits + 16 * extra
    return Outcome(model, stored)


for _weights, _activations, _bits, _activation in (
    ("qint8", None, 8, 16),
    ("qint8", "qint8", 8, 8),
    ("qfloat8", None, 8, 16),
    ("qfloat8", "qfloat8", 8, 8),
    ("qint4", None, 4, 16),
    ("qint4", "qint8", 4, 8),
    ("qint2", None, 2, 16),
):
    _name = f"quanto {_weights}{'' if _activations is None else f', {_activations} activations'}"
    add(_name, "optimum-quanto", _activation, partial(apply, weights=_weights, activations=_activations, bits=_bits))
