"""The traced denoiser: one graph for each combination of shapes, however many there are."""

from __future__ import annotations

import pytest
import torch
from torch import fx

pytest.importorskip("triton")

from ditq.kernels.traced import compiled


def test_a_model_takes_more_sizes_than_torch_allows_by_itself_and_traces_each_once() -> None:
    graphs: list[fx.GraphModule] = []
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    call = compiled(model, lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
    for _ in range(2):
        for tokens in range(1, 13):
            x = torch.randn(tokens, 4)
            assert torch.equal(call(x), model(x))
    assert len(graphs) == 12
