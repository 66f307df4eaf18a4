"""A session whose inputs are read, and whose outputs are left, where torch's tensors lie: nothing goes through the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

_ELEMENTS = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL,
}
_KINDS = {  # (how NumPy writes the type, torch's own): NumPy has no bfloat16, whose bits are read as int16
    "tensor(float)": ("<f4", torch.float32),
    "tensor(float16)": ("<f2", torch.float16),
    "tensor(bfloat16)": ("<i2", torch.bfloat16),
    "tensor(int64)": ("<i8", torch.int64),
    "tensor(int32)": ("<i4", torch.int32),
    "tensor(bool)": ("|b1", torch.bool),
}


class BoundSession:
    """Calls a session with tensors on `device`, the CPU or a GPU; there in the order of the stream that it was opened with."""

    def __init__(self, session: Any, device: torch.device) -> None:
        self._session, self._device = session, device
        self._inputs = [item.name for item in session.get_inputs()]
        self._outputs = [item.name for item in session.get_outputs()]
        self._options = onnxruntime.RunOptions()
        if device.type == "cuda":  # what reads the outputs waits for the stream, not the host for the GPU
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, on the device, of inputs that lie there."""
        binding, place = self._session.io_binding(), (self._device.type, self._device.index or 0)
        kept = {name: given[name].contiguous() for name in self._inputs}
        for name, tensor in kept.items():
            binding.bind_input(name, *place, _ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name in self._outputs:
            binding.bind_output(name, *place)
        self._session.run_with_iobinding(binding, self._options)
        made = zip(self._outputs, binding.get_outputs(), strict=True)
        return {name: self._copied(value) for name, value in made}

    def _copied(self, value: Any) -> Tensor:
        """The output in memory of torch's own: the runtime writes into its memory again at the next call."""
        memory, dtype = _Memory(value), _KINDS[value.data_type()][1]
        if self._device.type == "cuda":
            return torch.as_tensor(_OnGpu(memory), device=self._device).view(dtype).clone()
        return torch.from_numpy(np.asarray(memory)).view(dtype).clone()


class _Memory:
    """Where an output of the runtime lies, as NumPy asks for it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        kind = _KINDS[value.data_type()][0]
        self.__array_interface__ = {
            "shape": tuple(value.shape()),
            "typestr": kind,
            "data": (value.data_ptr(), False),
            "version": 3,
        }


class _OnGpu:
    """The same, as CUDA's libraries ask for it."""

    def __init__(self, memory: _Memory) -> None:
        self.memory = memory
        self.__cuda_array_interface__ = memory.__array_interface__
