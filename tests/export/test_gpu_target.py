"""The target for NVIDIA GPUs where there is none: engines are written, opened, run by torch, and refusals say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ditq.errors import DitqError
from ditq.export import Engine, load_engine
from ditq.export.targets import target
from ditq.kernels.on_gpu import as_wanted
from ditq.nn import ActivationFormat
from ditq.showing import diagnose
from tests.export.quantized import engine_of, quantize_blocks, quantized, shallow_model
from tests.families_small import forward, small_inputs

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("cuda") / "engine"
    return engine_of(quantize_blocks(shallow_model("dit")), folder, target_name="cuda")


def test_an_engine_for_it_holds_weights_and_no_graph_and_runs_in_torch(engine: Engine) -> None:
    assert sorted(file.name for file in engine.folder.iterdir()) == ["engine.json", "weights.safetensors"]
    assert engine.graphs == () and Engine.open(engine.folder).manifest["target"] == "cuda"
    inputs: dict[str, Any] = small_inputs(shallow_model("dit"))
    found = load_engine(engine.folder, "torch")(**inputs).sample
    assert torch.equal(found, forward(quantize_blocks(shallow_model("dit")), inputs))


def test_auto_takes_what_runs_an_engine_without_a_graph(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_engine(engine.folder).target == "torch"


def test_a_target_that_needs_a_graph_says_that_there_is_none(engine: Engine) -> None:
    with pytest.raises(
        DitqError, match="compiled for target 'cuda' and holds no graph, which target 'onnxruntime-cpu'"
    ):
        load_engine(engine.folder, "onnxruntime-cpu")


def _no_export(*_: Any) -> Any:
    raise ValueError("exported")


def test_formats_without_a_kernel_are_refused_before_the_model_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.export.write.export_what_varies", _no_export)
    model = shallow_model("dit")
    site = "transformer_blocks.0.attn1.to_q"
    timed = ActivationFormat(8, "timestep", edges=(500.0,))
    model.set_submodule(site, quantized(model.get_submodule(site), site, activation=timed))  # type: ignore[arg-type]
    with pytest.raises(
        DitqError, match=f"{site}: target 'cuda': activations with a scale a timestep have no kernel; set"
    ):
        engine_of(model, tmp_path / "engine", target_name="cuda")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("version", "seen", "capability", "said"),
    [
        (None, False, (0, 0), "was built without CUDA; install a CUDA build"),
        ("13.0", False, (0, 0), "no NVIDIA GPU, or no driver"),
        ("13.0", True, (7, 5), "Some GPU has compute capability 7.5; the kernels need 8.0"),
        ("13.0", True, (9, 0), "Some GPU, triton 3.7.1"),
        ("13.0", True, (10, 0), "Some GPU needs Triton 3.8 or newer, and this is 3.7.1"),
        ("13.0", True, (12, 0), "Some GPU, triton 3.7.1"),
    ],
)
def test_it_says_why_it_does_not_run_here(
    version: str | None, seen: bool, capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.7.1")
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    works, why = target("cuda").available()
    assert works == (capability in ((9, 0), (12, 0))) and said in why
    assert "\n" not in why


def test_timesteps_and_positions_stay_exact() -> None:
    assert as_wanted("timestep", torch.tensor([998.7])).dtype == torch.float32
    assert as_wanted("img_ids", torch.zeros(3, 3)).dtype == torch.float32
    assert as_wanted("class_labels", torch.zeros(3, dtype=torch.int64)).dtype == torch.int64
    assert as_wanted("hidden_states", torch.zeros(1, 3, 3)).dtype == torch.bfloat16


def test_doctor_says_that_the_answer_could_not_be_checked(engine: Engine) -> None:
    lines, well = diagnose(str(engine.folder))
    assert well and "it is for target cuda, which does not work here" in str(lines[-1])
