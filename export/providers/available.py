"""Whether ONNX Runtime can use this machine's GPU, and if not, everything that is missing, in one line."""

from __future__ import annotations

import ctypes
import functools
import io
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
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
    if not missing and (why := not_loaded()) is not None:
        missing.append(why)
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
def not_loaded() -> str | None:
    """Why a session does not get the provider, or cannot run by it; None if it can. The library wants CUDA and cuDNN of the
    versions that it was built with; without them ONNX Runtime itself writes a warning and goes on without the provider.
    """
    import onnxruntime

    from ditq.export.session import RUNTIME_ERRORS, first_line, session_options

    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # which says what is missing there, as the line below does
            onnxruntime.preload_dlls()  # those of NVIDIA's packages
    onnxruntime.set_default_logger_severity(4)
    try:
        session = onnxruntime.InferenceSession(
            _smallest_graph(), session_options(1), providers=[CUDA, "CPUExecutionProvider"], enable_fallback=0
        )
        if CUDA in session.get_providers():
            session.run(None, {"x": np.zeros((1, 2), np.float32)})
            return None
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"))
        reason = "no reason was given"
    except (OSError, RuntimeError, *RUNTIME_ERRORS) as error:
        reason = first_line(error)
    finally:
        onnxruntime.set_default_logger_severity(2)
    wants = getattr(onnxruntime, "cuda_version", "") or "of the version that it was built with"
    return (
        f"the CUDA provider of onnxruntime-gpu {onnxruntime.__version__} does not run ({reason}); it wants CUDA {wants} and "
        'cuDNN 9, which pip install "onnxruntime-gpu[cuda,cudnn]" brings, and a driver for it'
    )


def _smallest_graph() -> bytes:
    """A maximum, for which the provider needs cuDNN."""
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, n]) for name, n in (("x", 2), ("y", 1))
    )
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [-1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReduceMax", ["x", "axes"], ["y"])], "smallest", [x], [y], [axes]
    )
    made: Any = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())
