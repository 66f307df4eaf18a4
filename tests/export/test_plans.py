"""TensorRT plans: built here for GPUs that are not here, proven by TensorRT's own layers, refused in one line."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from ditq.budget.request import Candidate
from ditq.calibration.statistics import Statistics
from ditq.errors import DitqError
from ditq.export import Engine, load_engine, model_agreement, site_agreement
from ditq.export.onnx_graph import export_what_varies
from ditq.export.plans import library
from ditq.export.plans.build import PlanBuilder
from ditq.export.plans.fold import Folded, fold
from ditq.export.plans.layers import Layer
from ditq.export.plans.library import libraries, library_for
from ditq.export.plans.make import AHEAD_OF_TIME, kinds_of_gpu, make_plans
from ditq.export.plans.proof import proof_of, prove
from ditq.export.plans.run import plan_here
from ditq.export.plans.sizes import parse_sizes, sizes_of
from ditq.export.providers.proof import CPU, placement, report
from ditq.export.providers.run import opened
from ditq.export.targets import onnxruntime_cuda
from ditq.export.targets.tensorrt import lower
from ditq.families import family_of
from ditq.graph import DiTGraph
from ditq.nn import ActivationFormat, QuantLinear
from ditq.numerics.carrier import FLOAT4, FLOAT8
from ditq.passes import Context
from ditq.passes.quantize import Quantize
from ditq.passes.reconstruct import Reconstruct
from ditq.recipe import load_recipe, shipped_recipes
from tests.command_line import run
from tests.export.quantized import engine_of, means_torch, quantize_blocks, relative, shallow_model
from tests.export.quantized import quantized as coded
from tests.families_small import forward, small_inputs, statistics_of

# What the CUDA provider of onnxruntime-gpu 1.31.1 took of all shipped recipes on small models of four families, and what makes
# weights of codes, which is folded when a session is opened: `python -m tools.cuda_placement`
TAKEN_BY_CUDA = {
    "Add", "Cast", "Clip", "Concat", "Conv", "Cos", "Div", "Einsum", "Expand", "Gather", "Gelu", "LayerNormalization",
    "MatMul", "MatMulInteger", "MatMulNBits", "Max", "Mul", "MultiHeadAttention", "Neg", "Pow", "QuantizeLinear",
    "RMSNormalization", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Round",
    "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze",
    "BitwiseOr", "GatherElements",
}  # fmt: skip
SIZES = "batch=1:2:3,frames=1:3:5,image_tokens=16:64:128,text_tokens=8:16:32,height=8:16:32,width=8:16:32"


def sizes_for(engine: Engine) -> str:
    """Those of SIZES that the engine has axes for."""
    axes = {size for entry in engine.manifest["inputs"] for size in entry["shape"] if isinstance(size, str)}
    return ",".join(part for part in SIZES.split(",") if part.partition("=")[0] in axes)


def small_plan(family: str, folder: Path, gpus: tuple[str, ...], **settings: Any) -> Engine:
    engine = engine_of(quantize_blocks(shallow_model(family)), folder, target_name="tensorrt", **settings)
    return make_plans(engine, gpus, sizes_for(engine))[0]


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_a_plan_of_every_family_multiplies_what_was_planned_in_few_bits(family: str, tmp_path: Path) -> None:
    changing = ("hidden_states", "timestep") if family == "pixart" else None
    engine = small_plan(family, tmp_path / "engine", AHEAD_OF_TIME, changing=changing)
    proofs = prove(Engine.open(engine.folder))
    assert len(proofs) == len(AHEAD_OF_TIME)
    for proof in proofs.values():
        assert proof.complete and proof.planned == len(engine.sites) > 5, str(proof)
    # the graph itself, run by ONNX Runtime: each layer within float16's half unit, the whole up to ties
    inputs = small_inputs(shallow_model(family))
    assert max(site_agreement(engine, inputs).values()) < 1e-3
    agreement = model_agreement(engine, inputs)
    assert agreement.holds, str(agreement)
    means_torch(engine, inputs)


def wide_dit() -> nn.Module:
    """One block, wide enough for two groups of 64 columns."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.3)
    return model.eval().requires_grad_(False)


@functools.cache
def traced() -> tuple[DiTGraph, Statistics]:
    model = wide_dit()
    graph = DiTGraph(model, small_inputs(model))
    return graph, statistics_of(graph)


@functools.cache
def exported() -> ir.Model:
    """The graph with a node for each quantized linear: the same for every recipe but for what the linears are."""
    graph = quantized("w4a8")
    family = family_of("DiTTransformer2DModel")
    assert family is not None
    return export_what_varies(graph.model, small_inputs(graph.model), family.axes)[0]


def quantized(recipe: str) -> DiTGraph:
    """The model after the recipe, without learning, which needs recorded calls; a budget's formats in turns."""
    graph, statistics = traced()
    graph = copy.deepcopy(graph)
    found = load_recipe(recipe)
    for step in found.passes:
        if isinstance(step, Quantize) and found.budget is not None:
            sites = [site.name for site in graph.sites.values() if site.role in ("token", "modulation")]
            wanted = map(Candidate.parse, itertools.cycle(found.budget.candidates))
            rules = [_rule(site, next(wanted), _activation(graph, site, step)) for site in sites]
            step = replace(step, rules=[*step.rules, *rules])
        if not isinstance(step, Reconstruct):
            step.run(graph, Context(statistics))
    return graph


def _rule(site: str, wanted: Candidate, activation: str) -> dict[str, Any]:
    return {"select": site, "format": f"w{wanted.bits}a{activation}", "rank_share": wanted.share or 0}


def _activation(graph: DiTGraph, site: str, step: Quantize) -> str:
    return "16" if graph.sites[site].role == "modulation" else step.format.partition("a")[2]


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_both_gpu_targets_multiply_what_was_planned_of_every_shipped_recipe_in_few_bits(
    recipe: str, tmp_path: Path
) -> None:
    layers = {layer.site: layer for layer in quantized(recipe).model.modules() if isinstance(layer, QuantLinear)}
    check_onnxruntime_takes(layers, tmp_path)
    graph = exported().clone()
    planned = lower(graph, layers)
    ir.save(graph, tmp_path / "model.onnx")
    engine = Engine(tmp_path, {"planned": [entry.__dict__ for entry in planned]})
    shapes = {"hidden_states": (4, 8, 8), "timestep": (), "class_labels": ()}
    three = {name: tuple((batch, *shape) for batch in (1, 2, 3)) for name, shape in shapes.items()}
    builder = PlanBuilder(library_for("sm89"), recipe, fold(tmp_path / "model.onnx"), three)  # type: ignore[arg-type]
    for gpu in AHEAD_OF_TIME:
        proof = proof_of(engine, {"model.onnx": builder.build(gpu).layers})
        assert proof.complete and proof.planned == len(layers) > 5, f"{gpu}: {proof}"


def check_onnxruntime_takes(layers: dict[str, QuantLinear], folder: Path) -> None:
    """The graph of target onnxruntime-cuda is sound, of operators that its provider takes, with every planned product in it."""
    graph = exported().clone()
    planned = onnxruntime_cuda.lower(graph, layers)
    assert {entry.kind for entry in planned} <= {"integer", "weight-only kernel"}
    assert {node.op_type for node in graph.graph} <= TAKEN_BY_CUDA
    ir.save(graph, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"))
    engine = Engine(folder, {"planned": [entry.__dict__ for entry in planned]})
    found = report(engine, {"model.onnx": placement(opened(engine, "model.onnx", [(CPU, {})], 1))}, CPU)
    assert found.complete and found.planned == len(layers) > 5, str(found)


def test_products_of_fp8_numbers_are_planned_proven_and_agree(tmp_path: Path) -> None:
    model = shallow_model("dit")
    form = ActivationFormat(8, "token", "float8_e4m3")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "blocks" in name and "norm" not in name:
            model.set_submodule(name, coded(linear, name, activation=form, carrier=FLOAT8))
    engine, made = make_plans(
        engine_of(model, tmp_path / "engine", target_name="tensorrt"), ["sm89", "sm120"], "batch=2"
    )
    assert all(plan.proof.complete and plan.proof.planned == len(engine.sites) == 6 for plan in made)
    assert {kernel for plan in made for kernel in plan.proof.fused.values()} == {"gemm FP8 x FP8"}
    agreement = model_agreement(engine, small_inputs(model))
    assert agreement.holds and agreement.integers > 0, str(agreement)
    means_torch(engine, small_inputs(model))
    with pytest.raises(DitqError, match="multiplies FP8 numbers, which sm80 has no product of; set carrier: int8"):
        make_plans(engine, ["sm80"])


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_products_of_fp4_numbers_are_planned_proven_and_agree(family: str, tmp_path: Path) -> None:
    model = shallow_model(family)
    form = ActivationFormat(4, "tensor", "float4_e2m1", group_size=16)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "blocks" in name and "norm" not in name:
            layer = coded(linear, name, codebook="e2m1", activation=form, group_size=16, carrier=FLOAT4)
            assert layer.activation_scale is not None
            layer.activation_scale.fill_(8 / 2688)
            model.set_submodule(name, layer)
    engine = engine_of(model, tmp_path / "engine", target_name="tensorrt")
    for gpu in ("sm89", "sm90"):
        with pytest.raises(
            DitqError, match=f"(multiplies FP4 numbers, which {gpu} has no product of; set another format)|{gpu}:"
        ):
            make_plans(engine, [gpu])
    engine, made = make_plans(engine, (), sizes_for(engine))
    assert [plan.gpu for plan in made] == ["sm120"]  # of those that are built for where none is asked for
    assert all(plan.proof.complete and plan.proof.planned == len(engine.sites) > 5 for plan in made), str(made)
    assert {kernel for plan in made for kernel in plan.proof.fused.values()} == {"gemm FP4E2M1 x FP8 x FP4E2M1 x FP8"}
    inputs = small_inputs(model)
    assert max(site_agreement(engine, inputs).values()) < 1e-3
    agreement = model_agreement(engine, inputs)
    assert agreement.holds and agreement.integers > 0, str(agreement)
    means_torch(engine, inputs)


def test_products_that_are_not_low_bit_or_that_nobody_planned_are_named(tmp_path: Path) -> None:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["a/matmul"], name="a/matmul")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])), str(tmp_path / "model.onnx"))
    entry = {"site": "a", "kind": "integer", "input": "x", "product": "a/matmul", "output": "y"}
    engine = Engine(tmp_path, {"planned": [entry]})

    def said(*layers: Layer) -> str:
        return str(proof_of(engine, {"model.onnx": layers}))

    right = Layer("g0", "gemm", ("Int8",), ("Int8",), ("a/matmul",))
    assert said(right) == "1 of 1 planned low-bit products run as low-bit kernels"
    assert "not fused: a (gemm Half x Half)" in said(replace(right, inputs=("Half",), constants=("Half",)))
    assert "not fused: a (gemm Half x Int8)" in said(replace(right, inputs=("Half",)))
    assert "not fused: a (vanished from the plan)" in said()
    float4 = replace(right, inputs=("FP4E2M1", "FP8"), constants=("FP4E2M1", "FP8"))
    assert "not fused: a (gemm FP4E2M1 x FP8 x FP4E2M1 x FP8)" in said(float4)
    assert "unplanned: g1 (Half x Half)" in said(right, Layer("g1", "gemm", ("Half",), ("Half",), ("b",)))


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return small_plan("dit", tmp_path_factory.mktemp("plans") / "dit", ("sm89",))


def test_a_plan_lies_in_the_engine_by_gpu_and_version_and_is_checked_like_its_other_files(dit: Engine) -> None:
    (plan,) = Engine.open(dit.folder).plans
    (found,) = libraries()
    assert (plan["gpu"], plan["library"], plan["version"]) == ("sm89", found.name, found.version)
    assert plan["files"] == {"model.onnx": f"plans/{found.name}-{found.version}/sm89/model.plan"}
    assert (dit.folder / "plans" / found.folder / "timing.cache").is_file()
    path = dit.folder / plan["files"]["model.onnx"]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DitqError, match=r"model\.plan was changed since the engine was written"):
        Engine.open(dit.folder)
    path.write_bytes(content)


def test_a_second_kind_of_gpu_stands_beside_the_first_and_a_second_build_takes_its_place(dit: Engine) -> None:
    both, made = make_plans(dit, ["sm89", "SM120"], "batch=1:2:2")
    assert [plan["gpu"] for plan in both.plans] == ["sm89", "sm120"] == [plan.gpu for plan in made]
    assert {tuple(plan["sizes"]["batch"]) for plan in both.plans} == {(1, 2, 2)}
    assert both.plans == Engine.open(dit.folder).plans


def test_plan_and_doctor_say_what_is_multiplied_in_few_bits(dit: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    built = run(capsys, "plan", dit.folder, "--gpu", "sm80", "--sizes", "batch=1:1:2")
    assert built.code == 0
    count = f"{len(dit.sites)} of {len(dit.sites)} planned low-bit products run as low-bit kernels"
    assert built.out.startswith("sm80 by TensorRT for RTX") and built.out.endswith(f"{count}\n")
    found = run(capsys, "doctor", dit.folder)
    assert found.code == 0, found.out
    assert f"for sm80, tensorrt_rtx {libraries()[0].version}: {count}" in found.out
    assert "its graph run by ONNX Runtime, since tensorrt does not run here" in found.out


def test_codes_become_constants_of_their_carrier_only_in_memory(dit: Engine) -> None:
    folded = fold(dit.folder / "model.onnx")
    makers = {output: node for node in folded.proto.graph.node for output in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in folded.proto.graph.initializer}
    weights = [node for node in makers.values() if node.name.endswith("weight.dequantized")]
    assert {kinds[node.input[0]] for node in weights} == {onnx.TensorProto.INT8}
    stored = {
        tensor.name for tensor in onnx.load(str(dit.folder / "model.onnx"), load_external_data=False).graph.initializer
    }
    assert {node.input[0] for node in weights}.isdisjoint(stored)


def test_int4_constants_hold_two_numbers_a_byte_the_first_in_the_low_half(tmp_path: Path) -> None:
    numbers = onnx.numpy_helper.from_array(torch.tensor([[-8, 7, 3], [0, -1, 5]], dtype=torch.int8).numpy(), "numbers")
    nodes = [
        onnx.helper.make_node("Cast", ["numbers"], ["four"], to=onnx.TensorProto.INT4),
        onnx.helper.make_node("Cast", ["four"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    graph = onnx.helper.make_graph(nodes, "g", [], [out], [numbers])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)]), str(tmp_path / "model.onnx")
    )
    (tensor,) = fold(tmp_path / "model.onnx").proto.graph.initializer
    assert tensor.data_type == onnx.TensorProto.INT4
    assert onnx.numpy_helper.to_array(tensor).astype(int).tolist() == [[-8, 7, 3], [0, -1, 5]]


def test_a_refusal_names_the_onnx_node_and_its_module(tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    node = onnx.helper.make_node("Det", ["x"], ["y"], name="blocks.0.norm/node_det_3")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    with pytest.raises(DitqError, match=r"ONNX node blocks.0.norm/node_det_3 \(Det, module blocks.0.norm\)") as caught:
        PlanBuilder(library_for("sm89"), "engine", Folded(model, {}), {"x": ((2,), (2,), (2,))})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("text", "says"), [
    ("batch=2:1:4", "'batch=2:1:4' does not ascend from 1"), ("batch=0", "does not ascend"),
    ("batch", "'batch' is not like image_tokens=256:1024:4096"), ("batch=1:2", "is not like"),
])  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(DitqError, match=says):
        parse_sizes(text)


def test_an_axis_that_the_engine_has_not_is_refused(dit: Engine) -> None:
    with pytest.raises(DitqError, match="unknown 'bach'; did you mean 'batch'"):
        sizes_of(dit, "bach=1")
    assert sizes_of(dit, "batch=3") == {"batch": (3, 3, 3)}


def test_an_engine_of_another_target_has_no_plans(tmp_path: Path) -> None:
    engine = Engine(tmp_path, {"target": "onnxruntime-cpu"})
    with pytest.raises(
        DitqError, match="compiled for onnxruntime-cpu, which has no plans; compile with --target tensorrt"
    ):
        make_plans(engine)


@pytest.mark.parametrize("gpu", ["sm90", "sm75", "h100"])
def test_a_gpu_that_no_plan_is_built_for_is_refused_with_those_that_are(gpu: str) -> None:
    with pytest.raises(DitqError, match=f"gpu {gpu}: TensorRT for RTX .* builds plans for sm80, sm86, sm89"):
        kinds_of_gpu([gpu])


def test_without_tensorrt_plans_are_left_for_later(monkeypatch: pytest.MonkeyPatch, dit: Engine) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert kinds_of_gpu([]) == []
    with pytest.raises(DitqError, match="no TensorRT is installed; pip install"):
        make_plans(dit)


def test_a_plan_of_another_gpu_or_version_is_refused_and_the_next_target_runs_saying_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dit: Engine
) -> None:
    monkeypatch.setattr("ditq.export.plans.run.present_gpu", lambda: "sm86")
    says = (
        r"has plans for sm89 with tensorrt_rtx .*, but here are sm86 and TensorRT for RTX .*; build one with: ditq plan"
    )
    with pytest.raises(DitqError, match=says):
        plan_here(dit)
    inputs = small_inputs(shallow_model("dit"))
    loaded = load_engine(dit.folder, threads=1)
    assert loaded.target == "onnxruntime-cpu"
    assert "is run by onnxruntime-cpu instead" in capsys.readouterr().err
    assert torch.isfinite(loaded(**inputs).sample).all()
    with pytest.raises(DitqError, match="has plans for"):
        load_engine(dit.folder, target="tensorrt")


@pytest.mark.parametrize(("error", "says"), [
    (None, "is a build without CUDA"),
    (RuntimeError("Found no NVIDIA driver on your system.\nMore."), "no GPU that torch can use: Found no NVIDIA driver"),
    (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), "is too old"),
])  # fmt: skip
def test_no_gpu_no_driver_and_an_old_one_are_one_line_each(
    error: Exception | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise error or AssertionError

    monkeypatch.setattr(torch.version, "cuda", None if error is None else "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(DitqError, match=says) as caught:
        library.present_gpu()
    assert len(str(caught.value).splitlines()) == 1


def test_a_gpu_below_the_smallest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(DitqError, match="Tesla T4 is sm75; TensorRT plans need sm80"):
        library.present_gpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs plans on a GPU")
@pytest.mark.parametrize("family", ["flux", "dit"])
def test_a_plan_computes_what_the_quantized_model_means(family: str, tmp_path: Path) -> None:
    """On a GPU that a plan can be built for. Roundings that float16 tips change the output by about a percent."""
    model = quantize_blocks(shallow_model(family))
    engine = engine_of(model, tmp_path / "engine", target_name="tensorrt")
    make_plans(engine, [library.present_gpu()], sizes_for(engine))
    transformer = load_engine(engine.folder, target="tensorrt")
    for batch in (1, 3, 1):
        inputs = small_inputs(model, batch, seed=batch)
        assert relative(transformer(**inputs, return_dict=False)[0].cpu(), forward(model, inputs)) < 0.05
    with pytest.raises(DitqError, match=r"axis 'batch' is 4 in .*, but the plan takes 1 to 3"):
        transformer(**small_inputs(model, 4))
