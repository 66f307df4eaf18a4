"""The product of a stored weight, run in the way that is fastest on the GPU that its tensors are on."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels import matmul
from ditq.kernels.decode import decode_into
from ditq.kernels.storage import StoredWeight, store_carrier
from ditq.kernels.tuning import INTERPRETED, Tuner, Way
from ditq.numerics.carrier import E4M3

_CHECKED = 16  # tokens of a result that are compared with the plain meaning
_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_outgrown: list[Tensor] = []  # captured CUDA graphs may still write there


def product(
    x: Tensor,
    x_scale: Tensor | None,
    stored: StoredWeight,
    bias: Tensor | None,
    added: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, N] in `dtype`, of x [M, K] int8 or FP8 with its scales, or bfloat16 without."""
    y = torch.empty(x.shape[0], stored.rows, dtype=dtype, device=x.device)
    if not len(x):
        return y
    _run(_way(x, x_scale, stored, bias, added, y), x, x_scale, stored, bias, added, y)
    return y


def _run(
    way: Way,
    x: Tensor,
    x_scale: Tensor | None,
    stored: StoredWeight,
    bias: Tensor | None,
    added: Tensor | None,
    y: Tensor,
) -> None:
    if way.decoded:
        full = scratch(stored, torch.bfloat16 if way.library else (E4M3 if stored.float8 else torch.int8))
        decode_into(stored, full)
        if way.library:
            result = F.linear(x, full).float()
            result = result if bias is None else result + bias
            y.copy_(result if added is None else result + added)
            return
        stored = store_carrier(full, stored.scale)
    matmul.launch(x, x_scale, stored, bias, added, y, way.tile)


def scratch(stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Memory [N, K] for a weight in full, which the next product may overwrite: those of one stream follow each other."""
    size, place = stored.rows * stored.columns, (stored.data.device, dtype)
    if place not in _scratch or _scratch[place].numel() < size:
        _outgrown.extend([_scratch[place]] if place in _scratch else [])
        _scratch[place] = torch.empty(size, dtype=dtype, device=stored.data.device)
    return _scratch[place][:size].view(stored.rows, stored.columns)


@functools.cache
def _tuner(device: torch.device) -> Tuner:
    major, minor = torch.cuda.get_device_capability(device)
    return Tuner(torch.cuda.get_device_name(device), 10 * major + minor)


def _way(
    x: Tensor, x_scale: Tensor | None, stored: StoredWeight, bias: Tensor | None, added: Tensor | None, y: Tensor
) -> Way:
    if x.device.type == "cpu":
        return INTERPRETED

    def run(way: Way) -> Tensor:
        y.fill_(torch.nan)
        _run(way, x, x_scale, stored, bias, added, y)
        return y

    def right(found: Tensor) -> bool:
        few = slice(0, min(_CHECKED, len(x)))
        meaning = matmul.matmul_meaning(
            x[few], None if x_scale is None else x_scale[few], stored, bias, None if added is None else added[few]
        )
        error = torch.linalg.vector_norm(found[few].double() - meaning) / torch.linalg.vector_norm(meaning).clamp_min(
            1e-30
        )
        return (
            bool(found.isfinite().all()) and float(error) < 1e-2
        )  # bfloat16 results err by 2e-3, a wrong byte by far more

    return _tuner(x.device).way(
        stored, x.dtype, len(x), run, right, lambda call: triton.testing.do_bench(call, warmup=5, rep=20)
    )
