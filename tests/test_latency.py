"""Parts of a model timed as an engine runs them."""

from __future__ import annotations

import torch
from torch import nn

from ditq.latency import coded, seconds_of
from ditq.nn import QuantLinear


def feed_forward(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 64))


def test_a_wider_part_takes_longer_and_both_are_left_as_they_were() -> None:
    parts = [feed_forward(64), feed_forward(8192)]
    before = [part[0].weight.clone() for part in parts]  # type: ignore[index]
    narrow, wide = seconds_of(parts, torch.randn(1, 256, 64))
    assert 0 < narrow < wide
    assert all(torch.equal(part[0].weight, old) for part, old in zip(parts, before, strict=True))  # type: ignore[index]


def test_all_linears_but_a_router_are_coded() -> None:
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "router": nn.Linear(64, 4)})
    coded(model)
    assert isinstance(model["up"], QuantLinear) and type(model["router"]) is nn.Linear
