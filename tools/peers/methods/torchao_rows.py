"""torchao (github.com/pytorch/ao) by its own `quantize_`, on the token linears.

`Int4WeightOnlyConfig`, the tuned int4 kernel, and dynamic float8 activations need a GPU (or the GPU library mslk) and
do not run here; the same weight-only int4 arithmetic runs by `IntxWeightOnlyConfig`. Scales are counted in half
precision, which they have in a half-precision model.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch

from tools.peers.bench import Bench
from tools.peers.row import Outcome, add


def configs() -> dict[str, tuple[Any, float, int]]:
    """Name -> configuration, bits of a code, columns of a group (0: the row)."""
    from torchao import quantization as ao

    dtypes: Any = torch  # torch.int4 and torch.int3 are not in its stubs
    int3, int4 = dtypes.int3, dtypes.int4
    grouped = partial(ao.IntxWeightOnlyConfig, granularity=ao.PerGroup(64))
    return {
        "int8 dynamic": (ao.Int8DynamicActivationInt8WeightConfig(), 8, 0),
        "int8 weight-only": (ao.Int8WeightOnlyConfig(), 8, 0),
        "float8 weight-only": (ao.Float8WeightOnlyConfig(), 8, 0),
        "int8 dynamic, int4 g64": (
            ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=ao.PerGroup(64)),
            4,
            64,
        ),
        "int4 weight-only g64": (grouped(weight_dtype=int4), 4, 64),
        "int3 weight-only g64": (grouped(weight_dtype=int3), 3, 64),
        "Int4WeightOnlyConfig g64": (ao.Int4WeightOnlyConfig(group_size=64), 4, 64),
        "float8 dynamic": (ao.Float8DynamicActivationFloat8WeightConfig(), 8, 0),
    }


def apply(bench: Bench, name: str) -> Outcome:
    from torchao.quantization import quantize_

    config, bits, group = configs()[name]
    wanted, model = set(bench.token_sites), bench.graph.model
    with contextlib.redirect_stdout(None):
        quantize_(model, config, filter_fn=lambda module, place: place in wanted)
    stored = {}
    for site in wanted:
        sizes = bench.graph.sites[site]
        groups = sizes.out_features * (sizes.in_features // group if group else 1)
        stored[site] = sizes.parameters * bits + groups * 16
    return Outcome(model, stored)


for _name, _activation in (
    ("int8 dynamic", 8),
    ("int8 weight-only", 16),
    ("float8 weight-only", 16),
    ("int8 dynamic, int4 g64", 8),
    ("int4 weight-only g64", 16),
    ("int3 weight-only g64", 16),
    ("Int4WeightOnlyConfig g64", 16),
    ("float8 dynamic", 8),
):
    add(f"torchao {_name}", "torchao", _activation, partial(apply, name=_name))
