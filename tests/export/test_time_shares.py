"""Where the time of a call goes: every node of a profile is of one kind, told by its operator and the linear it belongs to."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from ditq.export import Engine
from ditq.export.targets import target
from ditq.export.targets.onnxruntime_cpu import lower
from ditq.export.time_shares import KINDS, _nodes, kind_of, of_session, shares
from ditq.kernels.kernel_times import kind_of_kernel
from ditq.nn import InputTransform
from ditq.numerics.rotation import hadamard_rotation
from tests.export.test_forms import graph_of, layer_of, tokens


def test_the_shares_of_a_session_are_of_all_its_nodes(tmp_path: Path) -> None:
    layer = layer_of(transform=InputTransform(rotations=[(0, 96, hadamard_rotation(96))]))
    model = graph_of(layer)
    lower(model, {layer.site: layer})
    ir.save(model, tmp_path / "model.onnx")
    found = of_session(Engine(tmp_path, {"structure": {"quantized": {"site": {}}}}), {"x0": tokens()}, 1)
    assert tuple(found) == KINDS
    assert sum(found.values()) == pytest.approx(1)
    assert found["attention"] == 0 and all(found[kind] > 0 for kind in KINDS if kind != "attention")
    assert target("onnxruntime-cpu").shares is not None


@pytest.mark.parametrize(("operator", "node", "kind"), [
    ("MatMulIntegerToFloat", "a.to_q/matmul", "products"),
    ("Gemm", "a.to_q/matmul/MatMulAddFusion", "products"),
    ("MatMul", "a.to_q/rotation.2", "rotation"),
    ("Transpose", "a.to_q/rotation.transpose", "rotation"),
    ("Mul", "a.to_q/scaled", "rotation"),
    ("ReduceMax", "a.to_q/maximum", "quantization"),
    ("QuantizeLinear", "a.to_q/quantized", "quantization"),
    ("Mul", "a.to_q/rescaled", "quantization"),
    ("Add", "a.to_q/biased", "rest"),
    ("MultiHeadAttention", "a/node_scaled_dot_product_attention/attention", "attention"),
    ("MatMul", "a/node_scaled_dot_product_attention/scores", "attention"),
    ("Softmax", "a/local_attention/weights", "attention"),
    ("ReduceSum", "a/compress_keys/pooled", "attention"),
    ("TopK", "a/sparse_attention/chosen", "attention"),
    ("MatMul", "embedder/node_linear", "products"),
    ("LayerNormalization", "norm/node_layer_norm", "rest"),
])  # fmt: skip
def test_a_node_is_of_the_kind_that_its_linear_wrote_it_for(operator: str, node: str, kind: str) -> None:
    assert kind_of(operator, node, {"a.to_q"}) == kind


def test_the_first_call_is_not_counted() -> None:
    def node(ts: int, time: int) -> dict[str, object]:
        return {"cat": "Node", "name": "n_kernel_time", "ts": ts, "dur": time, "args": {"op_name": "MatMul"}}

    events = [
        {"name": "model_run", "ts": 10, "cat": "Session"},
        node(11, 900),
        {"name": "model_run", "ts": 20},
        node(21, 5),
    ]
    assert _nodes(events, {}) == [("products", 5)]
    assert shares([]) == dict.fromkeys(KINDS, 0.0)


@pytest.mark.parametrize(("name", "kind"), [
    ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn", "products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn>(Params)", "products"),
    ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>(Flash_fwd_params)", "attention"),
    ("fmha_cutlassF_f16_aligned_64x128_rf_sm80", "attention"),
    ("void onnxruntime::cuda::QuantizeLinearKernelStd<256, 4, signed char, float>", "quantization"),
    ("triton_tem_fused__scaled_mm_3", "products"),
    ("triton_tem_fused_flex_attention_0", "attention"),
    ("triton_poi_fused_cat_mm_mul_scaled_dot_product_attention_7", "rest"),
    ("triton_red_fused__scaled_mm_abs_amax_clamp_1", "quantization"),
    ("void onnxruntime::cuda::_BinaryElementWiseSimple<true, false, float>", "rest"),
])  # fmt: skip
def test_a_kernel_is_told_by_its_name(name: str, kind: str) -> None:
    assert kind_of_kernel(name) == kind
