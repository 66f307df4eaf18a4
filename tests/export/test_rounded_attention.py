"""Attention with rounded parts: each ONNX form, and each engine, computes what torch means, on integers where it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export import Engine, load_engine, model_agreement, prove_fusion, site_agreement
from ditq.export.engine import MANIFEST, TEXT_GRAPH
from ditq.export.fusion import INTEGER_KERNELS, kernels_of
from ditq.export.onnx_graph import DOMAIN, OPSET
from ditq.export.session import open_session, session_options
from ditq.export.targets import Target, _targets, target
from ditq.export.targets.onnxruntime_cpu import lower
from ditq.families import CHANGING
from ditq.nn import AttentionRounding
from ditq.nn.attention_rounding import attach
from ditq.numerics.attention_rounding import AttentionFormat, rounded_attention
from tests.export.quantized import engine_of, means_torch, quantize_blocks, relative, shallow_model
from tests.families_small import forward, small_graph, small_inputs
from tests.numerics.test_attention_rounding import PARTS, STATIC

SCALE = 0.3


def graph_of(form: AttentionFormat, mask: ir.DataType | None) -> ir.Model:
    shapes = {"query": [2, 3, "queries", 16], "key": [2, 3, "tokens", 16], "value": [2, 3, "tokens", 16]}
    types = dict.fromkeys(shapes, ir.DataType.FLOAT)
    if mask is not None:
        shapes["mask"], types["mask"] = [2, 1, 1, "tokens"], mask
    given = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(types[name])) for name, shape in shapes.items()
    ]
    attributes: dict[str, Any] = {"site": "site", "number": form.number, "parts": form.parts, "scale": SCALE}
    attributes |= {"scales": list(form.scales)} if form.scales else {}
    attributes["rotate"] = int(form.rotate)
    node = ir.node("RoundedAttention", given, {**attributes, "smooth_keys": int(form.smooth_keys)}, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 3, "queries", 16])
    graph = ir.Graph(given, [y], nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="forms")
    return ir.Model(graph, ir_version=10)


def tensors(masked: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        name: torch.randn(2, 3, n, 16, generator=generator) for name, n in (("query", 33), ("key", 40), ("value", 40))
    }
    found["key"] = found["key"] + 3 * torch.randn(2, 3, 1, 16, generator=generator)
    if masked:
        found["mask"] = torch.zeros(2, 1, 1, 40)
        found["mask"][0, ..., 25:] = -10000.0
    return found


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("number", ["int8", "float8_e4m3", "float8_e4m3 static"])
@pytest.mark.parametrize("parts", PARTS)
def test_every_form_computes_what_it_means(parts: str, number: str, masked: bool, tmp_path: Path) -> None:
    number, _, static = number.partition(" ")
    form = AttentionFormat(number, parts, not static, STATIC if static else (), rotate=bool(static))
    model = graph_of(form, ir.DataType.FLOAT if masked else None)
    planned = lower(model, {})
    given = tensors(masked)
    ir.save(model, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", session_options(1))
    y = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0])
    expected = rounded_attention(given["query"], given["key"], given["value"], given.get("mask"), SCALE, form)
    # One number that falls to the other side of a tie moves the output by a step; of thousands that is little.
    assert relative(y, expected) < 1e-3

    integer = {entry.site for entry in planned if entry.kind == "integer"}
    wanted = {f"site/{name}" for name, pair in (("scores", "qk"), ("values", "pv")) if form.multiplies_integers(pair)}
    assert integer == wanted
    assert {part for entry in planned for part in entry.numbers or {}} == {f"site/{part}" for part in parts}
    kernels = kernels_of(tmp_path / "model.onnx")
    assert all(kernels[entry.product] in INTEGER_KERNELS for entry in planned if entry.kind == "integer")


def test_a_mask_of_true_and_false_is_taken(tmp_path: Path) -> None:
    form, given = AttentionFormat(), tensors(True)
    given["mask"] = given["mask"] == 0
    model = graph_of(form, ir.DataType.BOOL)
    lower(model, {})
    session = open_session(ir.to_proto(model).SerializeToString(), session_options(1))
    y = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0])
    expected = rounded_attention(given["query"], given["key"], given["value"], given["mask"], SCALE, form)
    assert relative(y, expected) < 1e-3


def rounded(model: nn.Module, family: str, form: AttentionFormat) -> nn.Module:
    """The model with every attention that it has rounded."""
    names = {found.module for found in small_graph(family).attentions.values()}
    for name in names & {name for name, _ in model.named_modules()}:
        attach(model.get_submodule(name), name, form)
    return model


def count(model: nn.Module) -> int:
    return sum(isinstance(module, AttentionRounding) for module in model.modules())


def check(engine: Engine, model: nn.Module, integer_products: int) -> None:
    """All of the engine: kernels, agreement up to ties, the rebuilt torch model, other sizes than it was traced with."""
    proof = prove_fusion(engine)
    assert proof.complete, str(proof)
    assert sum("/" in site for site in proof.fused) == integer_products
    assert max(site_agreement(engine, small_inputs(model)).values()) < 1e-3  # of the linears, as in test_engine.py
    exact = load_engine(engine.folder, target="torch")
    for batch in (1, 3):
        inputs = small_inputs(model, batch, seed=7)
        found = model_agreement(engine, inputs)
        # Given the same numbers only float32's own rounding is left, as in test_engine.py.
        assert found.holds and found.error < 1e-5, str(found)
        means_torch(engine, inputs)
        # Weights lie elsewhere in memory, for which a library may add in another order.
        assert relative(exact(**inputs).sample, forward(model, inputs)) < 1e-6


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_an_engine_with_integer_attention_agrees_with_torch_up_to_ties(family: str, tmp_path: Path) -> None:
    model = rounded(quantize_blocks(shallow_model(family)), family, AttentionFormat(rotate=True))
    assert count(model) >= 1
    check(engine_of(model, tmp_path / "engine", changing=CHANGING), model, 2 * count(model))


def test_a_float8_engine_that_keeps_the_keys_of_the_text_agrees_too(tmp_path: Path) -> None:
    form = AttentionFormat("float8_e4m3", "qkvpo", False, (0.01, 0.01, 0.01), rotate=True)
    model = rounded(quantize_blocks(shallow_model("pixart")), "pixart", form)
    engine = engine_of(model, tmp_path / "engine", changing=CHANGING)
    in_text = {entry.site.rpartition(".")[2] for entry in engine.planned if entry.graph == TEXT_GRAPH}
    assert in_text == {"to_k", "to_v"}
    check(engine, model, 0)


def test_an_attention_with_one_part_rounded_keeps_the_runtime_s_own_operator(tmp_path: Path) -> None:
    model = rounded(shallow_model("dit"), "dit", AttentionFormat("int8", "v"))
    engine = engine_of(model, tmp_path / "engine")
    assert "MultiHeadAttention" in kernels_of(engine.folder / "model.onnx").values()
    found = model_agreement(engine, small_inputs(model))
    assert found.holds and found.integers == 2 * 16 * 64, str(found)  # samples, tokens, channels


def test_engines_from_before_there_were_rounded_attentions_load(tmp_path: Path) -> None:
    model = quantize_blocks(shallow_model("dit"))
    engine = engine_of(model, tmp_path / "engine")
    manifest = json.loads((engine.folder / MANIFEST).read_text())
    del manifest["structure"]["attentions"]
    for entry in manifest["planned"]:
        del entry["numbers"]
    (engine.folder / MANIFEST).write_text(json.dumps(manifest))
    old = Engine.open(engine.folder)
    inputs = small_inputs(model)
    assert old.attentions == {} and model_agreement(old, inputs).holds
    assert torch.equal(load_engine(engine.folder, target="torch")(**inputs).sample, forward(model, inputs))


def test_a_target_that_does_not_know_rounded_attention_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower_linears_only(graph: ir.Model, layers: Any) -> list[Any]:
        return []

    other = Target("other", "", lambda: (True, ""), lower_linears_only, target("torch").runner)
    monkeypatch.setitem(_targets, "other", other)
    model = rounded(shallow_model("dit"), "dit", AttentionFormat())
    with pytest.raises(DitqError, match=r"target 'other' cannot run .* leave the pass quantize_attention out"):
        engine_of(model, tmp_path / "engine", target_name="other")
    assert not (tmp_path / "engine").exists()
