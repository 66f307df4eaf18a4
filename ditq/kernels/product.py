"""The product of a stored weight, run in the way that is fastest on the GPU that its tensors are on."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels import matmul
from ditq.kernels.decode import decode_into
from ditq.kernels.matmul import Product
from ditq.kernels.storage import StoredWeight, store_carrier
from ditq.kernels.tuning import INTERPRETED, Tuner, Way
from ditq.numerics.carrier import E4M3

_CHECKED = 16  # tokens of a result, or slots of each expert, that are compared with the plain meaning
_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_outgrown: list[Tensor] = []  # captured CUDA graphs may still write there


def computed(product: Product, dtype: torch.dtype) -> Tensor:
    """y in `dtype`: [M, N], or [samples E C, N] of experts."""
    count, tokens, outputs = product.size
    y = torch.empty(count * tokens, outputs, dtype=dtype, device=product.x.device)
    if len(y):
        _run(_way(product, y), product, y)
    return y


def _run(way: Way, product: Product, y: Tensor) -> None:
    stored = product.stored
    if way.decoded:
        full = scratch(stored, torch.bfloat16 if way.library else (E4M3 if stored.float8 else torch.int8))
        decode_into(stored, full)
        if way.library:
            y.copy_(_by_library(product, full))
            return
        product = replace(product, stored=store_carrier(full, stored.scale))
    matmul.launch(product, y, way.tile)


def _by_library(product: Product, full: Tensor) -> Tensor:
    """The vendor's product with a weight in full, bfloat16 [N, K] or [E N, K]."""
    if product.chosen is None:
        result = F.linear(product.x, full).float()
        result = result if product.bias is None else result + product.bias
        return result if product.added is None else result + product.added
    count, slots, outputs = product.size
    samples, experts = count // product.experts, product.experts
    rows = product.x[product.chosen.clamp_min(0)].view(samples, experts, slots, -1)
    result = (rows @ full.view(experts, outputs, -1).transpose(1, 2)).float()
    result = result if product.bias is None else result + product.bias.view(experts, 1, outputs)
    return torch.where((product.chosen >= 0).view(samples, experts, slots, 1), result, 0).view(-1, outputs)


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


def _way(product: Product, y: Tensor) -> Way:
    if product.x.device.type == "cpu":
        return INTERPRETED

    def run(way: Way) -> Tensor:
        y.fill_(torch.nan)
        _run(way, product, y)
        return y

    def right(found: Tensor) -> bool:
        part, meaning = _checked(product, found)
        error = torch.linalg.vector_norm(part.double() - meaning) / torch.linalg.vector_norm(meaning).clamp_min(1e-30)
        # bfloat16 results err by 2e-3, a wrong byte by far more
        return bool(found.isfinite().all()) and float(error) < 1e-2

    return _tuner(product.x.device).way(
        product.stored, product.x.dtype, product.tokens, product.experts, run, right,
        lambda call: triton.testing.do_bench(call, warmup=5, rep=20),
    )  # fmt: skip


def _checked(product: Product, found: Tensor) -> tuple[Tensor, Tensor]:
    """(part of what was found, what is meant there)."""
    few = slice(0, _CHECKED)
    if product.chosen is not None:
        part = replace(product, chosen=product.chosen[:, few].contiguous())
        count, slots, outputs = product.size
        return found.view(count, slots, outputs)[:, few].reshape(-1, outputs), matmul.experts_meaning(part)
    scales = None if product.x_scale is None else product.x_scale[few]
    added = None if product.added is None else product.added[few]
    return found[few], matmul.matmul_meaning(product.x[few], scales, product.stored, product.bias, added)
