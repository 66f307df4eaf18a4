"""An engine's graphs in float64: their operators are the runtime's, and another meaning is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ditq.errors import DitqError
from ditq.export import Engine, float64, float64_agreement
from ditq.export.engine import GRAPH
from ditq.export.engine_files import hash_file
from ditq.export.lowering.writer import MICROSOFT
from ditq.numerics.activation_format import ActivationFormat
from tests.command_line import assert_refused, run
from tests.export.quantized import engine_of, means_torch, quantize_blocks, quantized, shallow_model
from tests.families_small import small_inputs


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(quantize_blocks(shallow_model("dit")), tmp_path_factory.mktemp("float64") / "engine")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return small_inputs(shallow_model("dit"))


def test_it_is_torch_to_the_last_bits_where_float32_is_not(engine: Engine, inputs: dict[str, Any]) -> None:
    found = float64_agreement(engine, {**inputs, "return_dict": False})
    assert found.holds and found.meaning < 1e-12
    assert 1e-6 < found.engine < 3e-2 and 1e-6 < found.torch < 3e-2  # roundings that fall otherwise


@pytest.mark.parametrize("family", ["flux2", "sana", "hunyuan_video"])
def test_it_is_torch_in_other_families(family: str, tmp_path: Path) -> None:
    engine = engine_of(quantize_blocks(shallow_model(family)), tmp_path / "engine")
    means_torch(engine, small_inputs(shallow_model(family)))


def test_a_last_place_of_one_weight_s_scale_is_seen_and_doctor_exits_with_1(
    engine: Engine, inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change of 1e-5, which any float32 runtime's own differences would hide."""
    (tmp_path / "engine").mkdir()
    for file in engine.folder.iterdir():
        (tmp_path / "engine" / file.name).write_bytes(file.read_bytes())
    model = onnx.load(engine.folder / GRAPH, load_external_data=False)
    output = model.graph.output[0].name
    maker = next(node for node in model.graph.node if output in node.output)
    maker.output[list(maker.output).index(output)] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.00001), "factor"))
    model.graph.node.append(helper.make_node("Mul", ["before", "factor"], [output]))
    (tmp_path / "engine" / GRAPH).write_bytes(model.SerializeToString())
    forged = Engine(tmp_path / "engine", engine.manifest)
    forged = forged.update(files={**engine.files, GRAPH: hash_file(tmp_path / "engine" / GRAPH)})
    found = float64_agreement(forged, inputs)
    assert not found.holds and found.meaning == pytest.approx(1e-5, rel=1e-2)
    assert run(capsys, "doctor", forged.folder).code == 0
    ran = run(capsys, "doctor", forged.folder, "--float64")
    assert ran.code == 1 and "in float64 the graph's output is within 1e-05 of torch's" in ran.out


def test_what_cannot_be_compared_is_said(
    engine: Engine, inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    assert_refused(capsys, "--float64 compares an engine with torch; give its folder", "doctor", "--float64")
    without = engine_of(quantize_blocks(shallow_model("dit")), tmp_path / "cuda", target_name="cuda")
    with pytest.raises(DitqError, match="an engine for target cuda has no graph to compare"):
        float64_agreement(without, inputs)
    assert_refused(capsys, "target cuda has none", "doctor", without.folder, "--float64")
    monkeypatch.setattr(float64, "free_memory", lambda device: 1 << 20)
    with pytest.raises(DitqError, match=r"in float64 it takes 0\.0 GiB of memory, of which 0\.0 are free"):
        float64_agreement(engine, inputs)


# --- operators that are ONNX Runtime's own


def both(kind: str, inputs: dict[str, np.ndarray], domain: str = MICROSOFT, **settings: Any) -> tuple[Any, Any]:
    """(what ONNX Runtime computes in float32, what we do in float64)."""
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in inputs.items()
    ]
    node = helper.make_node(kind, list(inputs), ["y"], domain=domain, **settings)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph([node], "g", values, [result]), opset_imports=opsets, ir_version=10)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)
    wide = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in inputs.items()}
    (found,) = ReferenceEvaluator(float64.widened(model), new_ops=float64.OPERATORS).run(None, wide)  # type: ignore[arg-type]
    assert found.dtype == np.float64
    return expected, found


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def whole(kind: str, *shape: int) -> np.ndarray:
    low, high = {"uint8": (0, 256), "int8": (-127, 128)}[kind]
    return np.random.default_rng(sum(shape)).integers(low, high, shape).astype(kind)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("k", [96, 72])  # 72: the last block of 32 is not full, and five zero points are three bytes
def test_weights_of_four_bits_are_the_runtime_s(k: int, zeros: bool) -> None:
    n, blocks = 5, -(-k // 32)
    given = {"x": normal(2, 3, k), "codes": whole("uint8", n, blocks, 16), "scales": np.abs(normal(n, blocks))}
    if zeros:
        given["zero_points"] = whole("uint8", n, -(-blocks // 2))
    expected, found = both("MatMulNBits", given, K=k, N=n, bits=4, block_size=32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_attention_and_integer_products_are_the_runtime_s() -> None:
    given = {name: normal(2, tokens, 12) for name, tokens in (("q", 5), ("k", 7), ("v", 7))}
    expected, found = both("MultiHeadAttention", given, num_heads=3, scale=0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    given = {
        "a": whole("uint8", 2, 3, 8), "b": whole("int8", 8, 5), "a_scale": np.float32([0.02]), "b_scale": np.abs(normal(5)),
        "a_zero": np.uint8([128]), "b_zero": np.int8([0] * 5), "bias": normal(5),
    }  # fmt: skip
    expected, found = both("MatMulIntegerToFloat", given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    for approximate in ("none", "tanh"):
        expected, found = both("Gelu", {"x": normal(4, 9)}, domain="", approximate=approximate)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_torch_in_float64_casts_to_float64_only(inputs: dict[str, Any]) -> None:
    """Modules that compute in float32 whatever surrounds them do not lose bits; integers stay what they are."""

    class Narrows(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
            assert index.dtype == torch.int64
            return (x.float() / 3 + index.float(),)

    given = {"x": torch.tensor([1.0, 2.0]), "index": torch.tensor([1, 2])}
    found = float64.in_float64(Narrows(), given)
    assert torch.equal(found, torch.tensor([1 + 1 / 3, 2 + 2 / 3], dtype=torch.float64))


def test_a_constant_of_float32_meets_what_is_float64_in_a_product() -> None:
    """As in Mochi's positions, which the forward makes and multiplies with a parameter."""

    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frequencies = torch.nn.Parameter(torch.tensor([[1.0], [1 / 3]]), requires_grad=False)

        def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
            made = torch.arange(2, dtype=torch.float32)[None]
            return (x + torch.einsum("nd,dh->nh", made.to(torch.float32), self.frequencies.to(torch.float32)),)

    found = float64.in_float64(Positions(), {"x": torch.zeros(1, 1)})
    assert found.dtype == torch.float64 and float(found) == float(torch.tensor(1 / 3))


def test_a_norm_without_an_epsilon_keeps_that_of_float32() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.RMSNorm(2, elementwise_affine=False)

        def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
            return (self.norm(x),)

    x = torch.tensor([[3e-4, 4e-4]])
    wide = x.double()
    expected = wide / (wide.square().mean() + torch.finfo(torch.float32).eps).sqrt()
    torch.testing.assert_close(float64.in_float64(Norm(), {"x": x}), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [6, 7])
def test_tables_of_each_row_are_looked_up_however_long(bits: int, tmp_path: Path) -> None:
    model = shallow_model("dit")
    site = next(name for name, layer in model.named_modules() if name.endswith("net.2"))
    layer = quantized(model.get_submodule(site), site, bits, ActivationFormat(), "twin_log")  # type: ignore[arg-type]
    model.set_submodule(site, layer)
    assert float64_agreement(engine_of(model, tmp_path / "engine"), small_inputs(shallow_model("dit"))).holds
