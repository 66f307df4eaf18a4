"""The traced denoiser: one graph for each kind of block and combination of shapes, however many there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from ditq.kernels.on_gpu import as_wanted, to_gpu
from ditq.kernels.traced import compiled
from ditq.nn import ActivationFormat, InputTransform
from ditq.numerics.rotation import block_hadamard_rotation
from tests.export.quantized import quantized


@pytest.mark.parametrize(("name", "size", "kept"), [
    ("hidden_states", (2, 8, 64), torch.bfloat16),
    ("added_cond_kwargs.resolution", (2, 2), torch.bfloat16),
    ("timestep_cond", (2, 64), torch.bfloat16),  # an embedding, which weights multiply
    ("timestep", (2,), torch.float32),
    ("timestep", (2, 8), torch.float32),
    ("added_cond_kwargs.timesteps", (2, 8), torch.float32),
    ("img_ids", (8, 3), torch.float32),
    ("image_rotary_emb.0", (8, 64), torch.float32),
])  # fmt: skip
def test_timesteps_and_positions_are_not_rounded(name: str, size: tuple[int, ...], kept: torch.dtype) -> None:
    """Of 1000 timesteps bfloat16 has every fourth at the end, and cosines of it are off by up to 2^-9."""
    assert as_wanted(name, torch.rand(size)).dtype == kept


def test_a_model_takes_more_sizes_than_torch_allows_by_itself_and_traces_each_once() -> None:
    graphs: list[fx.GraphModule] = []
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    call = compiled(model, lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
    for _ in range(2):
        for tokens in range(1, 13):
            x = torch.randn(tokens, 4)
            assert torch.equal(call(x), model(x))
    assert len(graphs) == 12


def test_equal_blocks_are_compiled_once() -> None:
    """Four blocks with weights, scales, clips and names of their own, of which one has no scales; modulated from outside."""

    class Block(nn.Module):
        def __init__(self, name: str, scaled: bool, clip: float) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
            for part, linear in (("up", self.up), ("down", self.down)):
                width = linear.in_features
                scales = torch.rand(width) + 0.5 if scaled else None
                transform = InputTransform(scales, rotations=[(0, width, block_hadamard_rotation(width, 64))])
                form = ActivationFormat(8, "token", clip=clip)
                setattr(self, part, quantized(linear, f"{name}.{part}", activation=form, transform=transform))

        def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            z = F.layer_norm(x, (64,)) * (1 + gamma) + beta
            return x + self.down(F.gelu(self.up(z)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(f"blocks.{i}", i != 2, 1 - 0.1 * i) for i in range(4))

        def forward(self, x: Tensor, gamma: Tensor) -> Tensor:
            x = x.transpose(1, 2)  # as the patches of a convolution lie
            for block in self.blocks:
                x = block(x, gamma, beta=gamma)
            return x

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:  # what the kernels compute is tried elsewhere
        graphs.append(graph)
        made = [node.meta["example_value"] for node in graph.graph.output_node().args[0]]  # type: ignore[union-attr]
        return lambda *given: [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in made]

    model = to_gpu(Model().requires_grad_(False), torch.device("cpu"))
    call = compiled(model, keep)
    for tokens in (3, 5, 3):
        call(torch.randn(2, 64, tokens).bfloat16(), torch.randn(2, 1, 64).bfloat16())
    assert len(graphs) == 2 * 2  # for each of two sizes
    for graph in graphs:
        up, down = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.quantized.default)
        products = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.product.default)
        assert up.args[8] is True and up.args[1] is not None and down.args[10] == ""
        assert [product.args[14] for product in products] == ["gelu", ""]


@pytest.mark.parametrize(
    ("index", "fused"), [((slice(None), None), True), ((..., None, slice(None)), True), (1, False)]
)
def test_a_modulation_of_which_a_part_is_taken_is_not_taken_for_all_of_it(index: Any, fused: bool) -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = quantized(nn.Linear(64, 64), "up")

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.up(F.layer_norm(x, (64,)) * (1 + table)[index] + table[:1, None])

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return lambda *given: [torch.zeros(2, 3, 64, dtype=torch.bfloat16)]

    model = to_gpu(Modulated().requires_grad_(False), torch.device("cpu"))
    compiled(model, keep)(torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 64).bfloat16())
    (quantizer,) = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.ditq.quantized.default)
    assert (quantizer.args[1] is not None) == fused


@pytest.mark.parametrize("read_twice", [False, True])
def test_an_activation_goes_into_the_product_only_where_nothing_else_reads_what_it_reads(read_twice: bool) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = quantized(nn.Linear(64, 64), "up")

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return F.gelu(h) * h if read_twice else F.gelu(h) * 2

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return lambda *given: [torch.zeros(1, 3, 64, dtype=torch.bfloat16)]

    compiled(to_gpu(Gated().requires_grad_(False), torch.device("cpu")), keep)(torch.randn(1, 3, 64).bfloat16())
    for graph in graphs:
        (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.product.default)
        left = graph.graph.find_nodes(op="call_function", target=F.gelu)
        assert (product.args[14], len(left)) == (("", 1) if read_twice else ("gelu", 0))
    assert graphs


@pytest.mark.parametrize("carrier", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tokens", [3, 256])
def test_the_activation_behind_many_fp8_numbers_goes_to_where_it_is_rounded(carrier: torch.dtype, tokens: int) -> None:
    """A feed-forward, and the hidden channels of another behind what an attention gave."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"up": (64, 128), "hidden": (64, 128), "down": (128, 64), "out": (192, 64)}
            form = ActivationFormat(8, "token", "symmetric" if carrier is torch.int8 else "float8_e4m3")
            for name, size in sizes.items():
                layer = quantized(nn.Linear(*size), name, activation=form)
                assert layer.table is not None
                layer.table = layer.table.float().to(carrier)
                setattr(self, name, layer)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(F.gelu(self.up(x), approximate="tanh"))
            return y + self.out(torch.cat((x, F.gelu(self.hidden(x), approximate="tanh")), dim=2))

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return lambda *given: [torch.zeros(1, tokens, 64, dtype=torch.bfloat16)]

    compiled(to_gpu(Pair().requires_grad_(False), torch.device("cpu")), keep)(torch.randn(1, tokens, 64).bfloat16())
    (graph,) = graphs
    quantizers = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.quantized.default)
    products = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.product.default)
    before, behind = [node.args[10] for node in quantizers], [node.args[14] for node in products]
    rounded = carrier is not torch.int8 and tokens == 256
    assert sorted(before) == (["", "gelu_tanh", "gelu_tanh"] if rounded else ["", "", ""])
    assert sorted(behind) == ["", "", *([] if rounded else ["gelu_tanh", "gelu_tanh"])]  # else they are one product
    assert [len(node.args) for node in quantizers].count(23) == 1
    left = {node.target for node in graph.graph.nodes}
    assert not left & {F.gelu, torch.cat}


def test_an_activation_that_others_read_behind_other_channels_stays_behind_its_product() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            form = ActivationFormat(8, "token", "float8_e4m3")
            for name, size in {"hidden": (64, 128), "out": (192, 64)}.items():
                layer = quantized(nn.Linear(*size), name, activation=form)
                assert layer.table is not None
                layer.table = layer.table.float().to(torch.float8_e4m3fn)
                setattr(self, name, layer)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat((x, F.gelu(self.hidden(x), approximate="tanh")), dim=2)
            return self.out(both) + both.mean(-1, keepdim=True)

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return lambda *given: [torch.zeros(1, 256, 64, dtype=torch.bfloat16)]

    compiled(to_gpu(Read().requires_grad_(False), torch.device("cpu")), keep)(torch.randn(1, 256, 64).bfloat16())
    products = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.ditq.product.default)
    assert sorted(node.args[14] for node in products) == ["", "gelu_tanh"]
