"""The product of a stored weight, run in the way that is fastest on the GPU that its tensors are on."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
from torch import Tensor

from ditq.errors import DitqError
from ditq.kernels import matmul, tma_matmul, vector
from ditq.kernels.decode import decode_into
from ditq.kernels.library import library_product
from ditq.kernels.matmul import Product
from ditq.kernels.storage import StoredWeight, store_carrier
from ditq.kernels.tuning import INTERPRETED, Tuner, Way, label, ways
from ditq.numerics.carrier import E4M3

_CHECKED = 16  # tokens of a result, or slots of each expert, that are compared with the plain meaning
_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_outgrown: list[Tensor] = []  # captured CUDA graphs may still write there


def computed(product: Product, dtype: torch.dtype) -> Tensor:
    """y in `dtype`: [M, N], or [samples E C, N] of experts."""
    count, tokens, outputs = product.size
    y = torch.empty(count * tokens, outputs, dtype=dtype, device=product.x.device)
    return run_way(_way(product, dtype), product, y) if len(y) else y


def run_way(way: Way, product: Product, y: Tensor) -> Tensor:
    """The product, by a kernel into y, or by the library beside it."""
    stored = product.stored
    if way.decoded:
        full = scratch(stored, torch.bfloat16 if product.x_scale is None else E4M3 if stored.float8 else torch.int8)
        decode_into(stored, full)
        if not way.library:
            product = replace(product, stored=store_carrier(full, stored.scale))
    if way.library:
        return library_product(product, full if way.decoded else stored.data).to(y.dtype)
    (vector if way.vector else tma_matmul if way.tile.brought else matmul).launch(product, y, way.tile)
    return y


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


def _way(product: Product, dtype: torch.dtype) -> Way:
    several = _several_tables(product)
    if product.x.device.type == "cpu":
        # In bfloat16 the weight is written out with its scales, which the kernel would apply once more.
        return replace(INTERPRETED, decoded=several, library=several and product.x_scale is None)
    tuner, stored, kind = _tuner(product.x.device), product.stored, product.x.dtype
    how_many, whole = (product.tokens, product.experts), whole_rows(product)
    key = label(stored, kind, *how_many, whole, product.activation) + (" joined" if several else "")
    if key in tuner.known:
        return tuner.known[key]
    count, tokens, outputs = product.size
    y = torch.empty(count * tokens, outputs, dtype=dtype, device=product.x.device)

    def run(way: Way) -> Tensor:
        return run_way(way, product, y.fill_(torch.nan))

    def right(found: Tensor) -> bool:
        part, meaning = _checked(product, found)
        if not meaning.isfinite().all():
            raise DitqError(
                f"{key}: what it multiplies holds values that are not finite; look at the inputs of this call"
            )
        error = torch.linalg.vector_norm(part.double() - meaning) / torch.linalg.vector_norm(meaning).clamp_min(1e-30)
        # bfloat16 results err by 2e-3, a wrong byte by far more
        return bool(found.isfinite().all()) and float(error) < 1e-2

    def cost(
        way: Way,
    ) -> float:  # as a recorded graph, which it will be: what Python takes to launch kernels is no part of it
        milliseconds: float = triton.testing.do_bench_cudagraph(lambda: run_way(way, product, y), rep=5)
        return milliseconds

    few = [Way(tile, vector=True) for tile in vector.TILES] if vector.fits(product) else []
    tried = few + [
        way for way in ways(tuner.capability, stored.bits, kind, *how_many, whole) if way.decoded or not several
    ]
    return tuner.way(key, tried, run, right, cost)


def _several_tables(product: Product) -> bool:
    """Whether it is one product by weights with a table each, which the kernel that decodes as it multiplies does not know."""
    stored = product.stored
    return product.chosen is None and stored.rows_a_table < stored.rows and not stored.table_a_row


def whole_rows(product: Product) -> bool:
    """Whether it is one product of rows that TMA and the library can take, with a scale a token and a row."""
    stored, scales = product.stored, product.x_scale
    plain = product.chosen is None and scales is not None and scales.dim() == 1 and stored.scale.dim() == 1
    return plain and stored.columns % 16 == 0 and stored.rows % 16 == 0


def _checked(product: Product, found: Tensor) -> tuple[Tensor, Tensor]:
    """(part of what was found, what is meant there)."""
    few = slice(0, _CHECKED)
    if product.chosen is not None:
        part = replace(product, chosen=product.chosen[:, few].contiguous())
        count, slots, outputs = product.size
        return found.view(count, slots, outputs)[:, few].reshape(-1, outputs), matmul.experts_meaning(part)
    scales = None if product.x_scale is None else product.x_scale[few]
    added = None if product.added is None else product.added[few]
    meaning = matmul.matmul_meaning(product.x[few], scales, product.stored, product.bias, added, product.activation)
    return found[few], meaning
