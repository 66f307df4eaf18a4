"""Engines for ONNX Runtime on GPUs where there is none: what is chosen and why, tensors bound where they lie, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from ditq.errors import DitqError
from ditq.export import Engine, load_engine, model_agreement
from ditq.export.loader import engine_inputs
from ditq.export.providers import available as here
from ditq.export.providers.bound import BoundSession
from ditq.export.providers.choice import CUDA, RTX, TENSORRT, choose, foreign_operators
from ditq.export.providers.options import options_of
from ditq.export.providers.proof import CPU, prove, report
from ditq.export.providers.run import calls, failure, open_on_gpu, opened
from ditq.export.session import open_session, session_options
from ditq.export.targets import target
from ditq.showing import diagnose
from tests.export.quantized import engine_of, means_torch, quantize_blocks, relative, shallow_model
from tests.families_small import forward, small_inputs

KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Of PixArt: its text is a graph of its own."""
    model = quantize_blocks(shallow_model("pixart"))
    folder = tmp_path_factory.mktemp("providers") / "engine"
    return engine_of(model, folder, target_name="onnxruntime-cuda", changing=("hidden_states", "timestep"))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_tensors_of_every_kind_are_read_and_left_where_torch_has_them(dtype: torch.dtype) -> None:
    x, y = (helper.make_tensor_value_info(name, KINDS[dtype], ["n", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    bound = BoundSession(open_session(model.SerializeToString(), session_options(1)), torch.device("cpu"))
    first, second = (torch.arange(6 * i).view(-1, 3).to(dtype) for i in (1, 2))
    found = bound({"x": first.T.contiguous().T})["y"]
    bound({"x": second})
    assert found.dtype == dtype and torch.equal(found, first)  # also after the runtime's memory was used again


def test_bound_sessions_compute_what_the_engine_means_and_the_text_once(engine: Engine) -> None:
    device = torch.device("cpu")
    graphs = {graph: BoundSession(opened(engine, graph, [(CPU, {})], 1), device) for graph in engine.graphs}
    texts: list[int] = []
    text = graphs["text.onnx"]
    graphs["text.onnx"] = lambda inputs: texts.append(1) or text(inputs)  # type: ignore[assignment, func-returns-value]
    call, model = calls(engine, graphs), quantize_blocks(shallow_model("pixart"))
    for seed in (0, 0):
        inputs = small_inputs(model, seed=seed)
        # integers that float16 tips over to the other side move the output by about a percent
        assert relative(call(engine_inputs(engine, inputs)), forward(model, inputs)) < 0.05
    assert texts == [1]
    agreement = model_agreement(engine, inputs, model=model)
    assert agreement.holds and agreement.integers > 0, str(agreement)
    means_torch(engine, inputs)  # its halves made float64


def test_the_planned_products_are_found_again_in_what_the_runtime_made_of_the_graph(engine: Engine) -> None:
    ((where, proof),) = prove(engine).items()
    assert where == "the CPU provider, in place of CUDA's"
    assert proof.complete and proof.planned == len(engine.sites) > 5
    assert set(proof.fused.values()) == {f"MatMulInteger by {CPU}"}


def test_products_that_are_not_on_the_gpu_are_named(engine: Engine) -> None:
    nodes = {
        graph: onnx.load(str(engine.folder / graph), load_external_data=False).graph.node for graph in engine.graphs
    }
    placed = {graph: {node.name: (node.op_type, CUDA) for node in nodes[graph]} for graph in engine.graphs}
    assert report(engine, placed, CUDA).complete
    entry = engine.planned[0]
    (name,) = [node.name for node in nodes[entry.graph] if entry.product in node.output]
    placed[entry.graph][name] = ("MatMulInteger", CPU)
    found = report(engine, placed, CUDA)
    assert found.not_fused == {entry.site: f"MatMulInteger by {CPU}"}
    assert found.unplanned == {name: "MatMulInteger on the CPU"}
    del placed[entry.graph][name]
    assert report(engine, placed, CUDA).not_fused == {entry.site: "vanished from the graph by no provider"}


@pytest.mark.parametrize(("there", "foreign", "chosen", "says"), [
    ([RTX, TENSORRT, CUDA], [], RTX, "by ONNX Runtime's TensorRT for RTX provider"),
    ([TENSORRT, CUDA], [], TENSORRT, "TensorRT provider; TensorRT for RTX: not in this onnxruntime"),
    ([CUDA], [], CUDA, "CUDA provider; TensorRT for RTX: not in this onnxruntime; TensorRT: not in this onnxruntime"),
    ([TENSORRT, CUDA], ["MatMulInteger"], CUDA, "TensorRT: does not know MatMulInteger"),
])  # fmt: skip
def test_tensorrt_comes_first_for_graphs_that_it_knows(
    there: list[str], foreign: list[str], chosen: str, says: str
) -> None:
    choice = choose(there, foreign)
    assert choice.provider == chosen and says in str(choice)


def test_an_engine_in_its_own_forms_is_not_for_tensorrt(engine: Engine) -> None:
    assert foreign_operators(engine) == ["MatMulInteger", "MultiHeadAttention"]


def test_providers_get_the_stream_and_tensorrt_a_cache_and_the_sizes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sized = Engine(engine.folder, {**engine.manifest, "sizes": {"batch": [1, 2, 4], "text_tokens": [8, 16, 32]}})
    cuda = options_of(CUDA, sized, "model.onnx", 7)
    assert cuda.pop("cudnn_conv_algo_search") == "HEURISTIC"  # not a search at every new size
    assert cuda == {
        "device_id": "1",
        "user_compute_stream": "7",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    for provider, prefix, kept in ((TENSORRT, "trt", "trt_engine_cache_path"), (RTX, "nv", "nv_runtime_cache_path")):
        options = options_of(provider, sized, "model.onnx", 7)
        assert Path(options[kept]).is_dir() and options[kept].startswith(str(tmp_path))
        shapes = {name: options[f"{prefix}_profile_{name}_shapes"] for name in ("min", "opt", "max")}
        assert [shapes[name].split(",")[0] for name in shapes] == [f"hidden_states:{n}x4x8x8" for n in (1, 2, 4)]


@pytest.mark.parametrize("changed", ["model.onnx", "weights.safetensors"])
def test_what_tensorrt_built_is_not_used_for_another_graph_or_other_weights(
    engine: Engine, changed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sized = {**engine.manifest, "sizes": {"batch": [1, 2, 4], "text_tokens": [8, 16, 32]}}
    files = {**engine.files, changed: {**engine.files[changed], "sha256": "0" * 64}}
    engines = [Engine(engine.folder, sized), Engine(engine.folder, {**sized, "files": files})]
    for provider, kept in ((TENSORRT, "trt_engine_cache_path"), (RTX, "nv_runtime_cache_path")):
        assert len({options_of(provider, each, "model.onnx", 0)[kept] for each in engines}) == 2


def lacking(monkeypatch: pytest.MonkeyPatch, providers: list[str], packages: tuple[str, ...], gpu: str | None) -> str:
    """Why the target does not run on a machine with these providers and packages, and this GPU or none."""

    def kind(least: int, what: str) -> str:
        if gpu is None:
            raise DitqError("no GPU that torch can use: Found no NVIDIA driver on your system.")
        return gpu

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(here, "_installed", lambda name: name in packages)
    monkeypatch.setattr(here, "gpu_of", kind)
    works, why = target("onnxruntime-cuda").available()
    assert not works and "\n" not in why
    return why


def test_everything_that_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    why = lacking(monkeypatch, [CPU], ("onnxruntime",), None)
    assert "is the build without CUDA; pip uninstall onnxruntime, then pip install onnxruntime-gpu; and no GPU" in why
    assert "Found no NVIDIA driver" in lacking(monkeypatch, [CUDA, CPU], ("onnxruntime-gpu",), None)
    both = lacking(monkeypatch, [CPU], ("onnxruntime", "onnxruntime-gpu"), "sm89")
    assert "both installed and overwrite each other's files; pip uninstall both" in both


def test_a_provider_that_does_not_load_is_said_with_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    here.not_loaded.cache_clear()
    why = lacking(monkeypatch, [CUDA, CPU], ("onnxruntime-gpu",), "sm89")  # there is no such library here
    assert "does not run (" in why and "it wants CUDA" in why and "cuDNN 9" in why
    here.not_loaded.cache_clear()


def test_without_a_gpu_it_is_refused_and_auto_says_what_runs_instead(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DitqError, match=r"target 'onnxruntime-cuda' does not run here: .*pip install onnxruntime-gpu"):
        load_engine(engine.folder, "onnxruntime-cuda")
    loaded = load_engine(engine.folder, threads=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert loaded.target == "onnxruntime-cpu"
    assert line.startswith("note: target 'onnxruntime-cuda' does not run here: ") and "; target 'cuda'" in line
    assert line.endswith("engine is run by onnxruntime-cpu instead")


def test_a_session_without_the_provider_is_refused_not_run_on_the_cpu(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(onnxruntime, "InferenceSession", _only_on_cpu(onnxruntime.InferenceSession))
    with pytest.raises(DitqError, match="ONNX Runtime's CUDA provider does not load here; see what `ditq doctor`"):
        open_on_gpu(engine, "model.onnx", choose([CUDA], ["MatMulInteger"]), 7, 1)


def _only_on_cpu(real: Any) -> Any:
    """As ONNX Runtime does it where a provider's library does not load."""

    def session(path: str, options: Any, providers: Any, **settings: Any) -> Any:
        assert settings == {"enable_fallback": 0}
        return real(path, options, providers=[CPU])

    return session


@pytest.mark.parametrize("said", [
    "Failed to allocate memory for requested buffer of size 123", "CUDA failure 2: out of memory ; GPU=0",
])  # fmt: skip
def test_too_little_gpu_memory_is_one_line(engine: Engine, said: str) -> None:
    line = str(failure(engine, RuntimeError(f"Non-zero status code\n{said}\nmore")))
    assert "does not fit in the GPU's memory" in line and "\n" not in line
    other = str(failure(engine, RuntimeError("Invalid rank\nmore")))
    assert other.endswith("ONNX Runtime cannot run these inputs: Invalid rank")


def test_a_size_outside_what_the_graph_takes_is_named_before_it_runs(engine: Engine) -> None:
    inputs = small_inputs(shallow_model("pixart"))
    inputs["hidden_states"] = torch.zeros(2, 4, 16, 16)
    with pytest.raises(
        DitqError, match=r"hidden_states has shape \[2, 4, 16, 16\], but the engine takes \[batch, 4, 8, 8\]"
    ):
        engine_inputs(engine, inputs)


def test_doctor_says_which_providers_there_are_and_what_is_planned(engine: Engine) -> None:
    lines, well = diagnose(str(engine.folder))
    said = "\n".join(lines)
    assert well, said
    assert f"providers       {', '.join(onnxruntime.get_available_providers())}" in said
    assert "target onnxruntime-cuda: does not work (" in said
    count = f"{len(engine.sites)} of {len(engine.sites)} planned low-bit products run as low-bit kernels"
    assert f"for the CPU provider, in place of CUDA's: {count}" in said
    assert "its graph run by ONNX Runtime, since onnxruntime-cuda does not run here" in said


@pytest.mark.gpu
@pytest.mark.skipif(not target("onnxruntime-cuda").available()[0], reason="runs an engine on a GPU")
@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_on_a_gpu_every_planned_product_is_there_and_the_answer_is_what_is_meant(family: str, tmp_path: Path) -> None:
    """Integers that float16 tips over to the other side move the output by about a percent."""
    model = quantize_blocks(shallow_model(family))
    changing = ("hidden_states", "timestep") if family == "pixart" else None
    engine = engine_of(model, tmp_path / "engine", target_name="onnxruntime-cuda", changing=changing)
    assert all(proof.complete for proof in prove(engine).values())
    transformer = load_engine(engine.folder, "onnxruntime-cuda")
    for batch, seed in ((1, 1), (3, 3), (1, 1)):
        inputs = {name: value.cuda() for name, value in small_inputs(model, batch, seed).items()}
        with torch.cuda.stream(torch.cuda.Stream()):
            found = transformer(**inputs, return_dict=False)[0]
        torch.cuda.synchronize()
        expected = forward(model, {name: value.cpu() for name, value in inputs.items()})
        assert found.device.type == "cuda" and relative(found.cpu(), expected) < 0.05
