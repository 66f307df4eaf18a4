"""Whether ONNX Runtime can use this machine's GPU, and if not, everything that is missing, in one line."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnx
import torch

from ditq.errors import DitqError
from ditq.export.gpu import gpu_of
from ditq.export.providers.choice import CUDA

LEAST = 75  # Turing, the first with tensor cores for int8
INSTALL = "pip uninstall onnxruntime, then pip install onnxruntime-gpu"


def available() -> tuple[bool, str]:
    """Whether there is an ONNX Runtime with CUDA and a GPU that it runs on; which, or why not."""
    missing, kind = [], ""
    why = without_cuda()
    if why is not None:
        missing.append(why)
    try:
        kind = gpu_of(LEAST, "ONNX Runtime's CUDA provider needs")
    except DitqError as error:
        missing.append(str(error))
    if not missing and not loads():
        missing.append(_not_loaded())
    if missing:
        return False, "; and ".join(missing)
    import onnxruntime

    return True, f"onnxruntime-gpu {onnxruntime.__version__} on {torch.cuda.get_device_name()} ({kind})"


def without_cuda() -> str | None:
    """Why this ONNX Runtime has no CUDA provider, and what to install; None if it has one."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error}); pip install onnxruntime-gpu"
    if CUDA in onnxruntime.get_available_providers():
        return None
    if is_doubled():
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "pip uninstall both, then pip install onnxruntime-gpu"
        )
    return f"onnxruntime {onnxruntime.__version__} is the build without CUDA; {INSTALL}"


def is_doubled() -> bool:
    """Whether both packages of ONNX Runtime are installed, of which the later one has overwritten the other."""
    return all(_installed(name) for name in ("onnxruntime", "onnxruntime-gpu"))


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@functools.cache
def loads() -> bool:
    """Whether a session gets the provider: its library wants CUDA and cuDNN of the version that it was built with."""
    import onnxruntime

    from ditq.export.session import RUNTIME_ERRORS, session_options

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(
            _smallest_graph(), session_options(1), providers=[CUDA, "CPUExecutionProvider"], enable_fallback=0
        )
    except RUNTIME_ERRORS:
        return False
    return CUDA in session.get_providers()


def _not_loaded() -> str:
    import onnxruntime

    wants = getattr(onnxruntime, "cuda_version", "") or "the version that it was built with"
    return (
        f"the CUDA provider of onnxruntime-gpu {onnxruntime.__version__} does not load; it wants CUDA {wants} and cuDNN 9, "
        'such as pip install "onnxruntime-gpu[cuda,cudnn]" brings, and a driver for it'
    )


def _smallest_graph() -> bytes:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "smallest", [x], [y])
    made: Any = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())
