"""A GPU that is not there: tensors that say they are on `cuda`, compute on the CPU, and refuse what a GPU would refuse.

    with pretended_gpu():
        y = f(torch.ones(3).to("cuda"))     # raises where f mixes it with a tensor of the CPU, or draws with a CPU's generator

So code that takes a device is tested for keeping to it, without one. What torch does not dispatch, kernels and streams, is not
seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
# Positions in a tensor of the GPU may lie on the CPU, as torch copies them; not the other way round.
_POSITIONS = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class OnGpu(Tensor):
    """A tensor that lies on the pretended GPU. To torch's own code it is on `meta`, for which no driver is asked."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            device="meta", requires_grad=False,
        )  # fmt: skip
        made.inside = inside
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.inside!r})"

    def item(self) -> Any:  # torch would ask the driver to wait, before it dispatches
        return self.inside.item()

    def tolist(self) -> Any:
        return self.inside.tolist()

    def __bool__(self) -> bool:
        return bool(self.inside)

    def __float__(self) -> float:
        return float(self.inside)

    def __int__(self) -> int:
        return int(self.inside)

    def __index__(self) -> int:
        return int(self.inside)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """torch.tensor(data, device=...) makes its tensor without dispatching."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            made = func(*args, **{key: value for key, value in kwargs.items() if key != "device"})
            return made if isinstance(made, OnGpu) else OnGpu(made)
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    flat, _ = tree_flatten((args, dict(kwargs)))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, OnGpu)]
    wanted = kwargs.get("device")
    to_gpu = _is_gpu(wanted)
    _check_positions(func._schema.name, args)
    name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
    if there and name not in {"aten::_to_copy", "aten::copy_"} and func._schema.name not in _POSITIONS:
        beside = [value for value in tensors if not isinstance(value, OnGpu) and value.dim()]
        if beside:
            shapes = [tuple(value.shape) for value in beside]
            raise RuntimeError(f"{name}: expected all tensors on cuda:0, but these are on the CPU: {shapes}")
    if kwargs.get("generator") is not None and (there or to_gpu):
        raise RuntimeError(f"{name}: expected a 'cuda' generator but found 'cpu'")
    inner = {key: (torch.device("cpu") if key == "device" and to_gpu else value) for key, value in kwargs.items()}
    given, named = tree_map(lambda value: value.inside if isinstance(value, OnGpu) else value, (args, inner))
    found = func(*given, **named)
    if name == "aten::_to_copy" and wanted is not None:
        stays = to_gpu
    elif name == "aten::copy_":
        return args[0]
    else:
        stays = to_gpu or (bool(there) and wanted is None)
    if func._schema.name.endswith("_") and there and found is args[0].inside:  # in place: the same tensor is given back
        return args[0]
    return tree_map(lambda value: OnGpu(value) if isinstance(value, Tensor) else value, found) if stays else found


def _check_positions(name: str, args: Any) -> None:
    """Raise for positions on the GPU in a tensor of the CPU."""
    if name in _POSITIONS and not isinstance(args[0], OnGpu) and any(isinstance(part, OnGpu) for part in args[1]):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Inside, `.to(device)` puts a tensor on the pretended GPU and `.cpu()` brings it back."""
    with patch.object(torch.cuda, "_lazy_init", lambda: None), _FromData(), _Pretend():
        yield CUDA
