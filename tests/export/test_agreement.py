"""An engine is its torch meaning up to ties: in every format of activations, on the built-in model, and never by mistake."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import nn

import ditq
from ditq.calibration.record import Trajectories
from ditq.compiler import CompileOptions
from ditq.errors import DitqError
from ditq.export import Engine, float64_agreement, model_agreement, prove_fusion, site_agreement
from ditq.export.agreement import TIE_TOLERANCE
from ditq.export.engine import GRAPH
from ditq.export.engine_files import hash_file
from ditq.export.onnx_graph import OUTPUT
from ditq.nn import ActivationFormat, InputTransform
from ditq.nn.quant_linear import Branch
from ditq.recipe import Recipe, load_recipe
from tests.command_line import run
from tests.export.quantized import engine_of, means_torch, quantized, rotations, shallow_model
from tests.families_small import small_inputs, small_model

# by the part of the name that tells a linear of FLUX: activations, rank and branch
FORMATS: dict[str, tuple[ActivationFormat, int, Branch]] = {
    "attn": (ActivationFormat(8, "token"), 0, "integer"),
    "ff": (ActivationFormat(4, "token", "midrise", 0.8), 4, "float"),
    "ff_context": (ActivationFormat(8, "tensor"), 0, "integer"),
    "proj_mlp": (ActivationFormat(6, "token"), 4, "integer"),
    "proj_out": (ActivationFormat(8, "tensor"), 4, "float"),
}  # fmt: skip


def quantize_in_every_way(
    model: nn.Module, formats: Mapping[str, tuple[ActivationFormat, int, Branch]] = FORMATS
) -> nn.Module:
    """The linears of a small FLUX's blocks, each kind in a format of its own; those of attention rotated."""
    for name, linear in list(model.named_modules()):
        kind = next((part for part in name.split(".") if part in formats), None)
        if isinstance(linear, nn.Linear) and "blocks" in name and kind is not None:
            activation, rank, branch = formats[kind]
            rotated = [(0, linear.in_features, rotations(linear.in_features))] if kind == "attn" else []
            transform = InputTransform(rotations=rotated)
            settings: dict[str, Any] = {"activation": activation, "rank": rank, "branch": branch}
            model.set_submodule(name, quantized(linear, name, transform=transform, **settings))
    return model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(quantize_in_every_way(small_model("flux")), tmp_path_factory.mktemp("agreement") / "engine")


# the same where each group of channels has a scale
GROUPED: dict[str, tuple[ActivationFormat, int, Branch]] = {
    "attn": (ActivationFormat(8, "group", group_size=16), 0, "integer"),
    "ff": (ActivationFormat(4, "group", "midrise", 0.8, group_size=32), 4, "integer"),
    "ff_context": (ActivationFormat(6, "group", clip=0.7, group_size=64), 4, "float"),
    "proj_mlp": (ActivationFormat(8, "group", group_size=64), 4, "integer"),
    "proj_out": (ActivationFormat(4, "group", "midrise", group_size=32), 0, "integer"),
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return small_inputs(small_model("flux"))


def test_every_format_of_activations_agrees_up_to_ties(engine: Engine, inputs: dict[str, Any]) -> None:
    found = model_agreement(engine, inputs)
    # Given the same integers only float32 rounding is left: some units in the last place a layer, over four blocks.
    assert found.holds and found.error < 1e-5, str(found)
    means_torch(engine, inputs)
    image, text = inputs["hidden_states"].shape[1], inputs["encoder_hidden_states"].shape[1]
    double = image * (3 * 64 + 64 + 64 + 256) + text * (3 * 64 + 64 + 64 + 256)  # q, k, v, out, two of the feed-forward
    single = (image + text) * (3 * 64 + 64 + 320)  # q, k, v, proj_mlp, proj_out
    assert found.integers == 2 * 2 * (double + single)  # samples, blocks of a kind


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = quantize_in_every_way(shallow_model("flux"), GROUPED)
    return engine_of(model, tmp_path_factory.mktemp("grouped") / "engine")


def test_an_engine_without_rounded_inputs_agrees_too(inputs: dict[str, Any], tmp_path: Path) -> None:
    weight_only = dict.fromkeys(FORMATS, (ActivationFormat(), 0, "integer"))
    found = model_agreement(
        engine_of(quantize_in_every_way(shallow_model("flux"), weight_only), tmp_path / "e"), inputs
    )
    assert found.holds and found.integers == 0 and found.error < 1e-5, str(found)


def test_an_input_that_is_rotated_in_parts_is_found_again_in_the_graph(inputs: dict[str, Any], tmp_path: Path) -> None:
    """FLUX's single blocks join attention and feed-forward, each rotated by itself: the joined value is left out."""
    model = small_model("flux")
    site = "single_transformer_blocks.0.proj_out"
    linear = model.get_submodule(site)
    assert isinstance(linear, nn.Linear)
    cut = linear.out_features
    parts = [(0, cut, rotations(cut)), (cut, linear.in_features, rotations(linear.in_features - cut))]
    model.set_submodule(site, quantized(linear, site, transform=InputTransform(rotations=parts)))
    made = engine_of(model, tmp_path / "engine")
    (planned,) = made.planned
    assert len(planned.parts) == 2 and site_agreement(made, inputs)[site] < 1e-5


def test_a_scale_a_group_agrees_up_to_ties(grouped: Engine, inputs: dict[str, Any]) -> None:
    # float32 sums of up to 320 products in another order
    assert max(site_agreement(grouped, inputs).values()) < 5e-6
    means_torch(grouped, inputs)
    found = model_agreement(grouped, inputs)
    assert found.holds and found.error < 1e-5, str(found)


def test_each_group_has_an_integer_kernel_and_a_layer_that_lacks_one_is_named(grouped: Engine, tmp_path: Path) -> None:
    proof = prove_fusion(grouped)
    assert proof.complete and proof.planned == len(grouped.sites) == 8 + 4 + 5  # attention, feed-forwards, single block
    for entry in grouped.planned:
        spec = grouped.sites[entry.site]
        assert len(entry.groups) == spec["in_features"] // spec["activation"]["group_size"]
    site = "transformer_blocks.0.attn.to_k"

    def negate_a_group(graph: onnx.GraphProto) -> None:
        """Something between a weight and its product keeps the runtime from seeing the pattern."""
        product = _maker(graph, next(entry.groups[2] for entry in grouped.planned if entry.site == site))
        place = list(graph.node).index(product)
        graph.node.insert(place, helper.make_node("Neg", [product.input[1]], ["negated"]))
        graph.node[place + 1].input[1] = "negated"

    found = prove_fusion(_forged(grouped, tmp_path / "forged", negate_a_group))
    assert list(found.not_fused) == [site] and len(found.fused) == proof.planned - 1


def test_a_recorded_call_is_taken_as_it_is(engine: Engine, inputs: dict[str, Any]) -> None:
    recorded = inputs | {"return_dict": False, "joint_attention_kwargs": None, "guidance": None}
    assert model_agreement(engine, recorded) == model_agreement(engine, inputs)


def test_the_built_in_model_agrees_up_to_ties_on_real_inputs(tmp_path: Path) -> None:
    """Half of the blocks as w4a8, half as w4a4, since an export takes most of the time; rounded to nearest."""
    recipe = load_recipe("w4a8").to_json()
    quantize = recipe["passes"][-1]["quantize"]
    coarse = {"select": "transformer_blocks.[345].*", "format": "w4a4"}
    quantize |= {"rounding": "nearest", "refine": 0, "rules": [coarse, *quantize["rules"]]}
    settings: dict[str, Any] = {"steps": 4, "limit": 2, "bins": 1, "step_weights": False, "progress": False}
    ditq.calibrate("mini-pixart", tmp_path / "stats", **settings)
    options = CompileOptions(statistics=tmp_path / "stats", progress=False)
    compiled = ditq.compile("mini-pixart", tmp_path / "engine", Recipe.from_dict(recipe, "both"), options).engine
    assert {spec["activation"]["bits"] for spec in compiled.sites.values()} == {4, 8, 16}
    calls = list(Trajectories.open(tmp_path / "stats" / "trajectories").calls())
    for call in (calls[0], calls[-1]):
        found = model_agreement(compiled, call.arguments)
        assert found.holds and found.error < 1e-5 and found.excess < TIE_TOLERANCE, str(found)
        meant = float64_agreement(compiled, call.arguments)
        # roundings that fall otherwise in float32 take the engine away from there, and torch too; how far is chance
        assert meant.holds and max(meant.engine, meant.torch) < 0.2, str(meant)


# --- an engine that computes something else


def _coarser_steps(graph: onnx.GraphProto) -> None:
    """The step of every token's attention input is max|x| / 126."""
    _other_constant(graph, "transformer_blocks.0.attn.to_q/step", 1, 126.0)


def _wrong_scale(graph: onnx.GraphProto) -> None:
    """One calibrated scale is a tenth smaller than it should be."""
    _other_constant(graph, "transformer_blocks.0.ff_context.net.2/quantized", 1, 0.9 * 0.031)


def _swapped_weights(graph: onnx.GraphProto) -> None:
    """Keys are computed with the codes of the values."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == "transformer_blocks.0.attn.to_k.codes":
                node.input[place] = "transformer_blocks.0.attn.to_v.codes"


def _scaled_output(graph: onnx.GraphProto) -> None:
    """All integers are right; what comes after the last of them is off by half a percent."""
    maker = _maker(graph, OUTPUT)
    maker.output[0] = "before"
    graph.initializer.append(numpy_helper.from_array(np.float32(1.005), "factor"))
    graph.node.append(helper.make_node("Mul", ["before", "factor"], [OUTPUT]))


def _maker(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)


def _other_constant(graph: onnx.GraphProto, name: str, place: int, value: float) -> None:
    """What makes the value `name` reads another number at that place."""
    graph.initializer.append(numpy_helper.from_array(np.float32(value), "other"))
    _maker(graph, name).input[place] = "other"


def _forged(engine: Engine, folder: Path, change: Callable[[onnx.GraphProto], None]) -> Engine:
    """A copy of the engine with another graph, whose hash is written down."""
    shutil.copytree(engine.folder, folder)
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(model.graph)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    return Engine(folder, engine.manifest).update(files={**engine.files, GRAPH: hash_file(folder / GRAPH)})


@pytest.mark.parametrize("change", [_coarser_steps, _wrong_scale, _swapped_weights])
def test_wrong_integers_are_caught_and_named(
    change: Callable[[onnx.GraphProto], None], engine: Engine, inputs: dict[str, Any], tmp_path: Path
) -> None:
    found = model_agreement(_forged(engine, tmp_path / "engine", change), inputs)
    assert not found.holds and found.invalid and found.excess > 10 * TIE_TOLERANCE
    assert "are no rounding of the torch value" in str(found) and " at transformer_blocks.0." in str(found)


def test_a_wrong_output_is_caught(engine: Engine, inputs: dict[str, Any], tmp_path: Path) -> None:
    found = model_agreement(_forged(engine, tmp_path / "engine", _scaled_output), inputs)
    assert not found.holds and not found.invalid and found.error == pytest.approx(5e-3, rel=1e-2)


def test_doctor_says_so_and_exits_with_1(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run(capsys, "doctor", engine.folder)
    assert ran.code == 0 and "of torch up to ties" in ran.out
    ran = run(capsys, "doctor", _forged(engine, tmp_path / "engine", _coarser_steps).folder)
    assert ran.code == 1 and "are no rounding of the torch value" in ran.out


def test_a_graph_in_another_form_is_refused(engine: Engine, inputs: dict[str, Any], tmp_path: Path) -> None:
    def no_zero_point(graph: onnx.GraphProto) -> None:
        name = "transformer_blocks.0.ff_context.net.2"
        del _maker(graph, f"{name}/dequantized").input[2]
        del _maker(graph, f"{name}/quantized").input[2]

    with pytest.raises(DitqError, match="its activations are not quantized in a known form"):
        model_agreement(_forged(engine, tmp_path / "engine", no_zero_point), inputs)
