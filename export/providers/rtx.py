"""TensorRT for RTX as a provider of ONNX Runtime: a package of its own, whose library is registered with any ONNX Runtime."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ditq.export.providers.choice import RTX

MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"


@functools.cache
def devices() -> tuple[Any, ...]:
    """The GPUs that it runs on, in their order; none where it is not installed or does not load."""
    import onnxruntime

    from ditq.export.session import RUNTIME_ERRORS

    try:
        plugin = importlib.import_module(MODULE)
        onnxruntime.register_execution_provider_library(RTX, plugin.get_library_path())
    except (ImportError, OSError, AttributeError, *RUNTIME_ERRORS):
        return ()
    return tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == RTX)
