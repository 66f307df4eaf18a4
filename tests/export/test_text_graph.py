"""What sees only the text runs once for a text, and nothing of the engine's result changes by a bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export import EngineTransformer, load_engine, model_agreement, prove_fusion, site_agreement
from ditq.export.engine import TEXT_GRAPH, Engine
from ditq.export.text_cache import TextCache
from ditq.families import CHANGING
from ditq.nn import ActivationFormat, QuantLinear
from ditq.nn.call_timestep import tell_at_each_call
from ditq.numerics.codebooks import CODEBOOKS
from ditq.numerics.weight_code import encode
from tests.command_line import run
from tests.export.quantized import engine_of, means_torch, quantize_blocks, relative, shallow_model
from tests.families_small import forward, small_graph, small_inputs, small_model

BLOCK = "transformer_blocks.0"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantize_blocks(shallow_model("pixart"))


@pytest.fixture(scope="module")
def engines(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EngineTransformer]:
    """The same model with one graph for everything, and with the text's graph of its own."""
    folder = tmp_path_factory.mktemp("engines")
    engine_of(model, folder / "one")
    engine_of(model, folder / "two", changing=CHANGING)
    return {name: load_engine(folder / name, threads=1) for name in ("one", "two")}


def test_every_result_is_the_same_to_the_bit(engines: dict[str, EngineTransformer], model: nn.Module) -> None:
    steps: list[dict[str, Any]] = []
    for batch, text in ((2, 24), (1, 5), (3, 40)):
        inputs = small_inputs(model, batch, seed=text)
        inputs["encoder_hidden_states"] = torch.randn(batch, text, inputs["encoder_hidden_states"].shape[-1])
        mask = torch.ones(batch, text, dtype=torch.int64)
        mask[0, text // 2 :] = 0
        inputs["encoder_attention_mask"] = mask
        # The same text at another step, another text at the same step, the first text again.
        later = inputs | {"hidden_states": 2 * inputs["hidden_states"], "timestep": inputs["timestep"] - 100}
        steps += [inputs, later, inputs | {"encoder_hidden_states": -inputs["encoder_hidden_states"]}, later]
        steps += [inputs | {"encoder_attention_mask": torch.ones_like(mask)}]
    for step in steps:
        assert torch.equal(engines["two"](**step).sample, engines["one"](**step).sample)


def test_both_graphs_are_proven_and_agree_with_torch(engines: dict[str, EngineTransformer], model: nn.Module) -> None:
    engine = engines["two"].engine
    in_text = {entry.site for entry in engine.planned if entry.graph == TEXT_GRAPH}
    assert in_text == {f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"}
    proof = prove_fusion(engine)
    assert proof.complete and in_text < set(proof.fused) and len(proof.fused) == 10, str(proof)
    errors = site_agreement(engine, small_inputs(model))
    assert set(errors) == set(engine.sites) and max(errors.values()) < 1e-3  # as in test_engine.py
    agreement = model_agreement(engine, small_inputs(model))
    assert agreement.holds and agreement.integers > 0, str(agreement)
    means_torch(engine, small_inputs(model))


def test_only_what_the_step_changes_is_left_in_the_main_graph(engines: dict[str, EngineTransformer]) -> None:
    engine = engines["two"].engine
    assert engine.text is not None and set(engine.text["inputs"]) == {"encoder_hidden_states", "encoder_attention_mask"}
    assert engine.manifest["inputs"] == engines["one"].engine.manifest["inputs"]
    assert engine.files["weights.safetensors"] == engines["one"].engine.files["weights.safetensors"]  # stored once
    assert engines["one"].engine.text is None and engines["one"].engine.graphs == ("model.onnx",)


def test_only_a_text_that_differs_in_a_bit_is_computed_again() -> None:
    made: list[float] = []

    def make(inputs: Any) -> float:
        made.append(float(inputs["text"].sum()))
        return made[-1]

    cache = TextCache(make, kept=2)
    first, second, third = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), torch.tensor([3.0, 0.0])
    for text in (first, second, first.clone(), second):  # two branches of guidance, in turns
        assert cache({"text": text}) == float(text.sum())
    assert made == [1.0, 2.0]
    cache(
        {"text": torch.tensor([1.0, -0.0])}
    )  # equal as numbers, yet not the same; the second text was asked for later
    cache({"text": second})
    assert made == [1.0, 2.0, 1.0]
    cache({"text": third})
    cache({"text": first})
    assert made == [1.0, 2.0, 1.0, 3.0, 1.0]
    not_a_number = torch.full((2,), float("nan"))
    cache({"text": not_a_number})
    cache({"text": not_a_number.clone()})
    assert len(made) == 6
    assert cache({"text": first.double()}) == 1.0 and cache({"text": first[None]}) == 1.0
    assert len(made) == 8


def test_a_text_written_over_in_place_is_noticed() -> None:
    calls: list[Tensor] = []
    cache = TextCache(lambda inputs: calls.append(inputs["text"].clone()))
    text = torch.zeros(3)
    cache({"text": text})
    text[1] = 1.0
    cache({"text": text})
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["flux", "sd3", "dit"])
def test_where_text_and_time_mix_there_is_nothing_to_cache(family: str) -> None:
    assert small_graph(family).text_sites(CHANGING) == []


def test_the_linears_of_the_text_are_found_by_what_they_read() -> None:
    graph = small_graph("pixart")
    kept = [f"transformer_blocks.{i}.attn2.{name}" for i in (0, 1) for name in ("to_k", "to_v")]
    assert graph.text_sites(CHANGING) == [*kept, "caption_projection.linear_1", "caption_projection.linear_2"]
    assert graph.sites[f"{BLOCK}.attn1.to_k"].arguments == ("hidden_states", "timestep")
    assert graph.text_sites((*CHANGING, "encoder_hidden_states")) == []


@pytest.mark.parametrize("cached", [True, False])
def test_a_compile_caches_the_text_unless_told_not_to(
    cached: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model("pixart").save_pretrained(tmp_path / "checkpoint")  # type: ignore[operator]
    (tmp_path / "recipe.yaml").write_text(
        "passes: [{quantize: {format: w8a16, rounding: nearest, weighted: false, bias_correction: false}}]\n"
    )
    ran = run(
        capsys, "compile", tmp_path / "checkpoint", "-o", tmp_path / "engine", "-r", tmp_path / "recipe.yaml",
        "--cache-text" if cached else "--no-cache-text",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ("6 linears see only the text and run once for a prompt" in ran.out) == cached
    assert (Engine.open(tmp_path / "engine").text is not None) == cached == (tmp_path / "engine" / TEXT_GRAPH).exists()
    shown = run(capsys, "inspect", tmp_path / "engine").out
    assert (sum(line.split()[-1:] == ["prompt"] for line in shown.splitlines()) == 4) == cached


def test_inspect_counts_what_runs_once_for_a_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model("pixart").save_pretrained(tmp_path / "pixart")  # type: ignore[operator]
    small_model("dit").save_pretrained(tmp_path / "dit")  # type: ignore[operator]
    values = json.loads(run(capsys, "inspect", tmp_path / "pixart", "--json").out)
    sites = {site["site"]: site["macs"] for site in values["sites"]}
    # 24 text tokens: the caption projection 24 -> 64 -> 64, then keys and values of two blocks.
    assert sum(sites[name] for name in values["text_sites"]) == 24 * (24 * 64 + 64 * 64 + 4 * 64 * 64)
    assert "6 linears see only the text" in run(capsys, "inspect", tmp_path / "pixart").out
    assert "no keys and values are made of the text alone" in run(capsys, "inspect", tmp_path / "dit").out


@pytest.mark.parametrize("damage", ["gone", "changed", "not listed", "no outputs"])
def test_a_damaged_graph_of_the_text_is_refused(
    damage: str, engines: dict[str, EngineTransformer], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(engines["two"].engine.folder, tmp_path / "engine"))
    manifest = json.loads((folder / "engine.json").read_text())
    says = {
        "gone": "text.onnx is missing", "changed": "text.onnx was changed", "not listed": "does not list text.onnx",
        "no outputs": "no valid 'text'",
    }[damage]  # fmt: skip
    if damage == "gone":
        (folder / TEXT_GRAPH).unlink()
    elif damage == "changed":
        content = bytearray((folder / TEXT_GRAPH).read_bytes())
        content[-10] ^= 1
        (folder / TEXT_GRAPH).write_bytes(content)
    elif damage == "not listed":
        del manifest["files"][TEXT_GRAPH]
    else:
        del manifest["text"]["outputs"]
    (folder / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(DitqError, match=says):
        load_engine(folder)


def test_an_engine_from_before_there_was_such_a_graph_still_loads(
    engines: dict[str, EngineTransformer], model: nn.Module, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(engines["one"].engine.folder, tmp_path / "engine"))
    manifest = json.loads((folder / "engine.json").read_text())
    del manifest["text"]
    for entry in manifest["planned"]:
        del entry["graph"]
    (folder / "engine.json").write_text(json.dumps(manifest))
    old, inputs = load_engine(folder, threads=1), small_inputs(model)
    assert torch.equal(old(**inputs).sample, engines["one"](**inputs).sample)
    assert prove_fusion(old.engine).complete


def test_a_layer_whose_scale_the_timestep_tells_stays_in_the_graph_of_every_step(tmp_path: Path) -> None:
    model = shallow_model("pixart")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.endswith(("attn2.to_k", "attn2.to_v")):
            form = (
                ActivationFormat(8, "timestep", edges=(500.0,))
                if name.endswith("to_k")
                else ActivationFormat(8, "token")
            )
            code = encode(linear.weight, CODEBOOKS["twin_log_shared"](linear.weight, 4))
            scales = torch.tensor([0.05, 0.02]) if name.endswith("to_k") else None
            model.set_submodule(name, QuantLinear(name, code, linear.bias, form, scales))
    tell_at_each_call(model)
    engine = engine_of(model, tmp_path / "engine", changing=CHANGING)
    assert {entry.site: entry.graph for entry in engine.planned} == {
        f"{BLOCK}.attn2.to_k": "model.onnx",
        f"{BLOCK}.attn2.to_v": TEXT_GRAPH,
    }
    transformer, inputs = load_engine(tmp_path / "engine", threads=1), small_inputs(model, batch=1)
    for timestep in (900.0, 100.0):
        step = inputs | {"timestep": torch.tensor([timestep])}
        # No other activation is rounded, and both layers round the same text in both runtimes.
        assert relative(transformer(**step).sample, forward(model, step)) < 1e-4
