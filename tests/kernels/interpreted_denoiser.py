"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: blocks of small denoisers, traced, rewritten, run by the kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

from ditq.kernels.fast_experts import ExpertLinears
from ditq.kernels.fast_linear import FastLinear
from ditq.kernels.on_gpu import as_wanted, to_gpu
from ditq.kernels.traced import compiled
from tests.export.quantized import quantize_blocks, relative, shallow_model, with_experts
from tests.families_small import forward, small_inputs
from tests.kernels import interpreter

interpreter.install()
QUANTIZED, PRODUCT = torch.ops.ditq.quantized.default, torch.ops.ditq.product.default
EXPERTS = torch.ops.ditq.experts_product.default

# How many inputs are quantized, of them with a norm, a modulation, an activation, channels behind others, how many products
# have an activation behind, in one block of each kind, each a graph.
# flux: attention in and out, feed-forward in and out, each for image and text; the single block's in and out, where it joins
# attention and GELU. sd3: two blocks, whose first has an attention of the image alone beside the joint one, and whose last
# does not change the text. PixArt's and DiT's blocks are made of the same parts. With experts in the single block, its input
# is still quantized once, for attention, shared and routed experts alike; then what the attention gives, and what GELU gives
# in the shared expert and in all routed ones together.
EXPECTED = {"flux": (10, 5, 5, 0, 1, 3), "sd3": (15, 8, 8, 0, 0, 3), "flux experts": (12, 5, 5, 1, 0, 3)}
RUN = (("flux", ""), ("flux", "token"))  # interpreting takes long
TOKENS = {
    "hidden_states": (1, 6),
    "img_ids": (0, 6),
    "encoder_hidden_states": (1, 3),
    "txt_ids": (0, 3),
}  # axis, how many


@pytest.mark.parametrize(("family", "choice"), [("flux", ""), ("sd3", ""), ("flux", "token")])
def test_blocks_are_graphs_that_quantize_each_input_once_and_compute_the_meaning(family: str, choice: str) -> None:
    model = with_experts(family, choice) if choice else quantize_blocks(shallow_model(family))
    inputs: dict[str, Any] = small_inputs(model, batch=1)
    if family == "flux":
        inputs |= {name: inputs[name].narrow(axis, 0, count) for name, (axis, count) in TOKENS.items()}
    expected = forward(model, inputs)
    fast = to_gpu(model, torch.device("cpu"))
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        results = graph.graph.output_node().args[0]
        made = [node.meta["example_value"] for node in results]  # type: ignore[union-attr]
        zeros = tuple(torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in made)
        return graph.forward if (family, choice) in RUN else lambda *arguments: zeros

    wanted = {
        name: as_wanted(name, value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    found = forward(compiled(fast, keep), wanted)  # type: ignore[arg-type]
    assert len(graphs) == 2
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    calls = Counter(node.target for node in nodes)
    assert calls[PRODUCT] >= sum(isinstance(layer, FastLinear) for layer in fast.modules())
    assert calls[EXPERTS] == sum(isinstance(layer, ExpertLinears) for layer in fast.modules()) == (2 if choice else 0)
    quantizers = [node for node in nodes if node.target is QUANTIZED]
    fused = (
        len(quantizers),
        sum(node.args[8] is True for node in quantizers),
        sum(node.args[1] is not None for node in quantizers),
        sum(node.args[10] != "" for node in quantizers),
        sum(len(node.args) > 22 for node in quantizers),
        sum(node.args[14] != "" for node in nodes if node.target is PRODUCT),
    )
    assert fused == EXPECTED[f"{family} experts" if choice else family]
    if (family, choice) in RUN:
        # bfloat16 (2^-9 a rounding, some dozens of them) around integers that a last bit moves where they lie next to a tie.
        assert relative(found.float(), expected) < 0.05


def test_what_others_read_too_is_still_there_for_them() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fast = FastLinear(_layer())

        def forward(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
            z = torch.nn.functional.layer_norm(x, (64,)) * (1 + gamma[:, None])
            z = z + gamma[:, None]
            return self.fast(z) + z

    graphs: list[fx.GraphModule] = []
    x, gamma = torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    model = Twice()
    with torch.no_grad():
        found = compiled(model, lambda graph, _: graphs.append(graph) or graph.forward)(x, gamma)  # type: ignore[func-returns-value]
        assert relative(found.float(), model(x, gamma).float()) < 1e-2
    assert any(node.target is torch.nn.functional.layer_norm for node in graphs[0].graph.nodes)


def _layer() -> Any:
    from tests.export.quantized import quantized

    return quantized(torch.nn.Linear(64, 64), "site").requires_grad_(False)
