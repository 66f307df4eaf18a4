"""What makes queries and keys, and FP8 attention, in traced blocks: found, put into kernels, and the same in the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from ditq.errors import DitqError
from ditq.kernels.asked import answering
from ditq.kernels.fp8_attention import INSTALL, FP8Attention, why_not
from ditq.kernels.heads import NORM, ROTARY, ROTATED, WEIGHT
from ditq.kernels.on_gpu import check, to_gpu
from ditq.kernels.traced import compiled
from ditq.nn.attention_rounding import AttentionRounding, attach
from ditq.numerics.attention_rounding import FLOAT8, PARTS, AttentionFormat
from ditq.numerics.carrier import E4M3
from tests.export.quantized import quantized, relative
from tests.families_small import forward, small_inputs, small_model

CPU = torch.device("cpu")
STATIC = AttentionFormat(FLOAT8, PARTS, False, (0.02, 0.03, 0.01), rotate=True)
ALL = NORM | WEIGHT | ROTARY
HEADS, FP8 = torch.ops.ditq.heads.default, torch.ops.ditq.fp8_attention.default


def traced(model: nn.Module) -> tuple[Any, list[fx.GraphModule]]:
    """(the model's call through its rewritten blocks, these)."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    return compiled(to_gpu(model, CPU), keep), graphs


def parts(made: fx.Node) -> list[tuple[int, int]]:
    """(pieces, steps) of each part that an operator makes."""
    return list(zip(made.args[1], made.args[2], strict=True))  # type: ignore[arg-type]


def nodes(graphs: list[fx.GraphModule], target: Any) -> list[fx.Node]:
    return [node for graph in graphs for node in graph.graph.find_nodes(op="call_function", target=target)]


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = small_model("flux").to(torch.bfloat16)
    given = small_inputs(model)
    for name, parameter in model.named_parameters():
        if "norm_" in name and name.endswith("weight") and parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model, {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}


def test_queries_and_keys_of_flux_are_made_by_one_kernel() -> None:
    model, inputs = flux()
    expected = forward(model, inputs)
    call, graphs = traced(model)
    with torch.no_grad():
        found = call(**inputs, return_dict=False)[0]
    made = nodes(graphs, HEADS)
    attentions = nodes(graphs, F.scaled_dot_product_attention)
    assert len(made) == len(attentions) == len(graphs)
    assert {tuple(parts(node)) for node in made} == {((1, ALL),) * 2, ((2, ALL),) * 2}  # single and double blocks
    assert not nodes(graphs, torch.rms_norm) and not nodes(graphs, torch.stack)
    assert relative(found.float(), expected.float()) < 0.02  # bfloat16 is rounded to once, and not after each operation


def test_fp8_attention_of_flux_reads_and_gives_fp8_and_computes_its_meaning() -> None:
    model, inputs = flux()
    exact = forward(model, inputs)
    sites = [name for name, _ in model.named_modules() if name.endswith(".attn")]
    for site in sites:
        attach(model.get_submodule(site), site, STATIC)
    meant = forward(model, inputs)
    call, graphs = traced(model)
    with torch.no_grad():
        found = call(**inputs, return_dict=False)[0]
    assert len(nodes(graphs, FP8)) == len(graphs) and not nodes(graphs, F.scaled_dot_product_attention)
    made = nodes(graphs, HEADS)
    assert len(made) == len(graphs) and all(node.args[7] is not None for node in made)  # none in bfloat16
    assert all([steps for _, steps in parts(node)] == [ALL | ROTATED, ALL | ROTATED, 0] for node in made)
    joined = [node for node in nodes(graphs, torch.cat) if node.args[1:] == (1,) or node.kwargs.get("dim") == 1]
    assert not [node for node in joined if node.meta["example_value"].dim() == 4]  # read where they lie
    assert relative(found.float(), meant.float()) < 0.02 < relative(meant.float(), exact.float())


class Block(nn.Module):
    """An attention whose output a quantized linear reads, in front of others' channels or alone."""

    def __init__(self, behind: bool, rotary: bool, norm: bool, after: bool = False) -> None:
        super().__init__()
        self.behind, self.rotary, self.after = behind, rotary, after
        self.norm = nn.RMSNorm(16, eps=1e-5) if norm else None
        self.attention = Attention()
        self.out = quantized(nn.Linear(128 if behind else 64, 64), "out")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = k = x.unflatten(-1, (4, 16))
        if self.norm is not None:
            q = self.norm(q)
        if self.rotary:
            real, imaginary = q.reshape(*q.shape[:-1], -1, 2).unbind(-1)
            turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
            q = (q.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(q.dtype)
        y = self.attention(q, k, x.unflatten(-1, (4, 16)))
        y = F.layer_norm(y, (64,)) if self.after else y
        return self.out(torch.cat((y, F.gelu(x)), dim=-1) if self.behind else y)


class Attention(nn.Module):
    def forward(self, *given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given)).transpose(1, 2).flatten(2)


def graph_of(**settings: bool) -> fx.GraphModule:
    """Of a block with FP8 attention; what the kernels compute is tried elsewhere."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(**settings) for _ in range(2))

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, cos, sin)
            return x

    model = Model().requires_grad_(False)
    for number in range(2):
        site = f"blocks.{number}.attention"
        attach(model.get_submodule(site), site, STATIC)
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return lambda *given: [torch.zeros(1, 6, 64, dtype=torch.bfloat16)]

    angles = torch.rand(6, 16)
    compiled(to_gpu(model, CPU), keep)(torch.randn(1, 6, 64).bfloat16(), angles.cos(), angles.sin())
    (graph,) = graphs
    return graph


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("rotary", "norm"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_rounds_for_the_next_linear_reads_fp8(behind: bool, rotary: bool, norm: bool) -> None:
    graph = graph_of(behind=behind, rotary=rotary, norm=norm)
    (quantizer,), made = nodes([graph], torch.ops.ditq.quantized.default), nodes([graph], HEADS)
    assert len(nodes([graph], FP8)) == len(made) == 1
    query = (NORM | WEIGHT if norm else 0) | (ROTARY if rotary else 0)
    assert parts(made[0]) == [(1, query | ROTATED), (1, ROTATED), (1, 0)]
    assert (made[0].args[4][0] == 1e-5) == norm and (made[0].args[5] is not None) == rotary  # type: ignore[index]
    x, tail, times = quantizer.args[0], quantizer.args[22], quantizer.args[23]
    while isinstance(x, fx.Node) and x.target is not FP8:
        assert x.op == "call_method" and x.target in ("transpose", "flatten")
        x = x.args[0]
    assert isinstance(x, fx.Node) and (tail is not None) == behind and isinstance(times, fx.Node)
    assert not [node for node in graph.graph.nodes if node.target == "type_as"]  # nothing reads it in bfloat16


def test_a_norm_behind_the_attention_reads_bfloat16() -> None:
    graph = graph_of(behind=False, rotary=False, norm=False, after=True)
    (quantizer,) = nodes([graph], torch.ops.ditq.quantized.default)
    assert quantizer.args[8] is True and len(quantizer.args) == 22
    assert [node for node in graph.graph.nodes if node.target == "type_as"]


@pytest.mark.parametrize("change", ["other pairs", "halves", "two epsilons", "another table", "order"])
def test_what_is_not_such_a_query_is_left_as_it_is(change: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.RMSNorm(16, eps=1e-5), nn.RMSNorm(16, eps=1e-3)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q = k = v = x.unflatten(-1, (4, 16))
            if change == "two epsilons":
                q = torch.cat((self.first(q[:, :2]), self.second(q[:, 2:])), dim=1)
            elif change == "halves":
                real, imaginary = q.reshape(*q.shape[:-1], 2, -1).unbind(-2)
                turned = torch.cat([-imaginary, real], dim=-1)
                q = (q.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(q.dtype)
            else:
                real, imaginary = q.reshape(*q.shape[:-1], -1, 2).unbind(-1)
                pair = [-real, imaginary] if change == "other pairs" else [-imaginary, real]
                turned = torch.stack(pair, dim=-1).flatten(3)
                cos = cos[0] if change == "another table" else cos[None, :, None]
                q = (q.float() * cos + turned.float() * sin[None, :, None]).to(q.dtype)
            q, k, v = (part if change == "order" else part.transpose(1, 2) for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v)

    model = Model().requires_grad_(False)
    angles, x = torch.rand(6, 16), torch.randn(1, 6, 64)
    expected = model(x, angles.cos(), angles.sin())
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    found = compiled(model, keep)(x, angles.cos(), angles.sin())
    assert graphs and not nodes(graphs, HEADS) and torch.equal(found, expected)


def test_the_operator_is_given_what_is_rotated_already() -> None:
    part = FP8Attention(AttentionRounding("site", STATIC), CPU)
    assert part.rotates and part.form == replace(STATIC, rotate=False)
    assert part.factors.tolist() == pytest.approx([50, 100 / 3, 100, 0.02, 0.03, 0.01])
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, n, 16, generator=generator).to(E4M3) for n in (5, 7, 7)]
    with answering([None, part]):
        found = torch.ops.ditq.fp8_attention(*given, 1, 0.3)
    wide = [x.float() * s for x, s in zip(given, STATIC.scales, strict=True)]
    exact = F.scaled_dot_product_attention(*wide, scale=0.3)
    assert found.dtype == E4M3 and found.transpose(1, 2).is_contiguous()
    assert relative(found.float() * 0.01, exact) < 0.04  # probabilities and outputs are rounded


def test_what_has_no_kernel_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("dit")
    attach(model.get_submodule("transformer_blocks.0.attn1"), "transformer_blocks.0.attn1", AttentionFormat())
    with pytest.raises(DitqError, match=r"transformer_blocks\.0\.attn1: target 'cuda': .*parts: qkvpo, scales: static"):
        check(model)
    assert why_not(STATIC) is None  # where there is no GPU, nothing more is known
    assert "needs compute capability 9.0, which this GPU of 8.9 has not" in str(why_not(STATIC, 89))
    monkeypatch.setitem(__import__("sys").modules, "cudnn", None)
    assert INSTALL in str(why_not(STATIC, 90))
