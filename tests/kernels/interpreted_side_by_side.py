"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: linears that read one input, as one product, against each alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ditq.kernels import side_by_side
from ditq.kernels.fast_linear import FastLinear
from ditq.kernels.matmul import Product, matmul_meaning
from ditq.kernels.on_gpu import to_gpu
from ditq.kernels.product import computed
from ditq.kernels.side_by_side import joined, stacks
from ditq.kernels.traced import compiled
from ditq.nn import ActivationFormat
from ditq.numerics.carrier import E4M3
from tests.export.quantized import quantized, relative
from tests.kernels import interpreter

interpreter.install()
FORMS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "8 bits": {"bits": 8, "codebook": "uniform"},
    "a table a row": {"codebook": "twin_log"},
    "FP8": {"activation": ActivationFormat(8, "token", "float8_e4m3")},
}


class Attention(nn.Module):
    """Of image alone, or with keys, or keys and values, of a text; its output linear has their form too."""

    def __init__(self, form: str, of_text: str = "kv") -> None:
        super().__init__()
        self.of_text = of_text
        for name in ("to_q", "to_k", "to_v", "to_out"):
            layer = quantized(nn.Linear(64, 64), name, **FORMS[form])
            if layer.table is not None and name == "to_k":  # tables of their own
                layer.table = (layer.table.float() / 2).to(layer.table.dtype)
            if form == "FP8":
                assert layer.table is not None
                layer.table = layer.table.float().to(E4M3)
            setattr(self, name, layer)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        other = x if text is None else text
        q, k = self.to_q(x), self.to_k(other)
        v = self.to_v(other if "v" in self.of_text else x)
        return self.to_out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("crossed", [False, True])
def test_linears_of_one_input_are_one_product_and_give_what_each_gives(
    form: str, crossed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "MANY", 1)
    torch.manual_seed(0)
    fast = to_gpu(Attention(form).requires_grad_(False), torch.device("cpu"))
    given = (torch.randn(2, 5, 64).bfloat16(), *([torch.randn(2, 3, 64).bfloat16()] if crossed else []))
    alone = fast(*given)
    graphs: list[fx.GraphModule] = []
    with torch.no_grad():
        found = compiled(fast, lambda graph, _: graphs.append(graph) or graph.forward)(*given)  # type: ignore[func-returns-value]
    assert torch.equal(found, alone)
    (graph,) = graphs
    (together,) = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.products.default)
    left = graph.graph.find_nodes(op="call_function", target=torch.ops.ditq.product.default)
    assert (len(together.args[2]), len(left)) == ((2, 2) if crossed else (3, 1))


def test_joined_weights_of_inputs_in_floating_point_are_scaled_once() -> None:
    both = []
    for seed in range(2):
        torch.manual_seed(seed)
        layer = quantized(nn.Linear(64, 64), "site", activation=ActivationFormat()).requires_grad_(False)
        assert layer.table is not None
        layer.table = layer.table // (seed + 1)  # tables of their own
        both.append(FastLinear(layer))
    parts = [torch.stack([getattr(layer.stored, name) for layer in both]) for name in ("data", "tables", "scale")]
    data, tables, scale = parts[0].flatten(0, 1), parts[1], parts[2].flatten(0, 1)
    stored = replace(both[0].stored, rows=128, data=data, tables=tables, scale=scale)
    product = Product(torch.randn(5, 64).bfloat16(), None, stored)
    expected = matmul_meaning(product.x, None, stored, None)
    assert relative(computed(product, torch.float32).double(), expected) < 1e-2  # bfloat16 errs by 2e-3


def test_linears_of_one_input_with_another_between_them_stay_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "MANY", 1)
    fast = to_gpu(Attention("4 bits", "k").requires_grad_(False), torch.device("cpu"))
    x, text = torch.randn(2, 5, 64).bfloat16(), torch.randn(2, 5, 64).bfloat16()
    graphs: list[fx.GraphModule] = []
    with torch.no_grad():
        compiled(fast, lambda graph, _: graphs.append(graph) or graph.forward)(x, text)  # type: ignore[func-returns-value]
    assert not graphs[0].graph.find_nodes(op="call_function", target=torch.ops.ditq.products.default)


def test_weights_of_one_form_lie_one_after_the_other_and_are_joined_without_a_copy() -> None:
    fast = to_gpu(Attention("4 bits").requires_grad_(False), torch.device("cpu"))
    ((_, linears),) = stacks(fast)
    assert list(linears) == ["to_q", "to_k", "to_v", "to_out"]
    data = [layer.stored.data for layer in linears.values()]
    whole = joined(data[1:3])
    assert whole is not None and whole.data_ptr() == data[1].data_ptr()
    assert torch.equal(whole, torch.cat(data[1:3]))
    apart = joined([data[0], data[2]])
    assert apart is not None and torch.equal(apart, torch.cat([data[0], data[2]]))
    assert joined([]) is None


def test_linears_of_other_forms_stay_by_themselves() -> None:
    block = nn.Module()
    block.a, block.b = quantized(nn.Linear(64, 64), "a"), quantized(nn.Linear(64, 128), "b")
    block.c, block.d = quantized(nn.Linear(64, 64), "c", bits=3), quantized(nn.Linear(64, 64), "d", rank=2)
    block.e = quantized(nn.Linear(64, 64, bias=False), "e")
    fast = to_gpu(block.requires_grad_(False), torch.device("cpu"))
    assert all(isinstance(layer, FastLinear) for layer in fast.children()) and not list(stacks(fast))
