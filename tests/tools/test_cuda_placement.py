"""The CUDA without a GPU that ONNX Runtime's provider is asked with: its answers, and the kernels that it writes down."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from tools.cuda_placement import kernels_of
from tools.cuda_without_gpu import compile_cuda, source_of


@pytest.mark.skipif(shutil.which("cc") is None, reason="compiles C")
def test_the_libraries_answer_what_they_must_and_name_what_is_launched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = {
        "libcudart.so.13": ["cudaMalloc", "cudaStreamCreate", "cudaSetDevice"],
        "libcublas.so.13": ["cublasGemmEx"],
    }
    compile_cuda(wanted, tmp_path)
    runtime, products = (ctypes.CDLL(str(tmp_path / name)) for name in wanted)
    major, place, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    assert runtime.cudaDeviceGetAttribute(ctypes.byref(major), 75, 0) == 0 and major.value == 8
    assert runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(100)) == 0 and place.value and place.value % 256 == 0
    assert runtime.cudaStreamCreate(ctypes.byref(stream)) == 0 and stream.value
    assert runtime.cudaSetDevice(0) == 0
    kernel = ctypes.c_void_p(0x1234)
    runtime.__getattr__("__cudaRegisterFunction")(None, kernel, None, b"flash_fwd_kernel<64>")
    runtime.cudaLaunchKernel(kernel)
    products.cublasGemmEx(None, 0, 0, 8, 8, 8, None, None, 3, 8, None, 3, 8, None, None, 10)
    said = capfd.readouterr().err
    assert kernels_of(said) == {"attentions in one kernel": 1, "products of int8": 1}


def test_every_symbol_is_defined_once() -> None:
    source = source_of("libcublas.so.13", ["cublasCreate_v2", "cublasGemmEx", "cublasGetStatusString"])
    assert [source.count(f"{name}(") for name in ("cublasCreate_v2", "cublasGemmEx", "cublasGetStatusString")] == [
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(("name", "kind"), [
    ("_ZN7cutlass6KernelINS_4gemm6kernel11GemmFpAIntBINS1_11threadblockE", "products of float16 with few-bit weights"),
    ("void onnxruntime::contrib::cuda::Dequantize4BitsKernel<__half, unsigned char>", "few-bit weights expanded to float16"),
    ("cublas 2 x 2 -> 2", "products of float16"),
    ("void onnxruntime::cuda::_BinaryElementWise<float>", "others"),
])  # fmt: skip
def test_a_kernel_is_counted_by_what_it_multiplies(name: str, kind: str) -> None:
    assert kernels_of(f"KERNEL {name}\nanything else\n") == {kind: 1}
