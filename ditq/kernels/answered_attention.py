"""Attentions that a part answers for, on a GPU: windows by torch's FlexAttention, and tiles of large pictures
(tiled_attention.py); linear attention as its products; others by torch's own attention over what they gather.

The parts are taken off the model, so that the traced graph has torch's own attention at their places, for which traced.py puts
`ditq::answered_attention`. To the compiler that is one node, the same in all blocks; it asks the part of the block that runs,
which knows the picture's size of the call.

FlexAttention skips blocks of 128 queries and 128 keys that see nothing of each other. So image tokens are put into an order in
which such a block is a square of the picture, or a cube of the video; which blocks see each other is found once a size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ditq.kernels import tiled_attention
from ditq.kernels.asked import asked
from ditq.kernels.blocks import with_limits
from ditq.kernels.captured import hold
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.held_tiles import HeldTiles, Turns
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.ordered_tokens import ordered_tokens
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention, detach_all, tell
from ditq.numerics.head_windows import by_heads
from ditq.numerics.linear_attention import linear_attention
from ditq.numerics.local_attention import Pooling
from ditq.numerics.sparse_attention import sparse_attention
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Side, Window, patches

_BLOCK = 128
_SQUARE, _CUBE = (1, 8, 16), (2, 8, 8)  # frames, rows and columns that are a block, of a picture and of a video
_IMAGE, _TEXT, _POOLED = 0, 1, 2


class Answer:
    """A part as the operator finds it: in float32 on the device, whatever the model computes in."""

    def __init__(self, part: TokenAttention, device: torch.device) -> None:
        self.part = part.to(device, torch.float32)
        part.attention = KINDS[type(part)](part)  # type: ignore[method-assign,assignment]


_MARK = "ditq_answers"


def take_off(model: nn.Module, device: torch.device) -> None:
    """Take the parts off `model`; `answers_of` it tells them."""
    setattr(model, _MARK, {site: Answer(part, device) for site, part in detach_all(model).items()})


def answers_of(model: nn.Module) -> dict[str, Answer]:
    """The parts that answer for attentions of a model on a GPU, by the module that these are in."""
    found: dict[str, Answer] = getattr(model, _MARK, {})
    return found


def tell_grids(model: nn.Module, given: Mapping[str, Any]) -> tuple[Grid, ...]:
    """Tell the parts the size of the picture of a call with these arguments. What was told: a recorded call is for that."""
    parts = [answer.part for answer in answers_of(model).values()]
    tell(parts, given)
    grids = [part.grid for part in parts if part.grid is not None]
    if (ordered := ordered_tokens(model)) is not None:
        grids.append(ordered.tell(given))
    return tuple(dict.fromkeys(grids))


def turns_of(model: nn.Module) -> Turns:
    """Which tells the parts the steps of pictures."""
    return Turns(answer.part for answer in answers_of(model).values())


@custom_op("ditq::answered_attention", mutates_args=())
def answered_attention(query: Tensor, key: Tensor, value: Tensor, place: int, scale: float | None) -> Tensor:
    """What the part at that place among those that are `answering` gives for query, key, value [B, h, N, d]."""
    with _as_outside_of_operators():
        y = asked()[place].part(query, key, value, None, scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)  # which is how the model reads it


@contextmanager
def _as_outside_of_operators() -> Iterator[None]:
    """Dispatch as where no operator is being called, without gradients.

    Within an operator torch leaves autograd out, and vmap too where it watches an operator's first call, as it does for
    compiled graphs. FlexAttention and its compilation are made of both, and would find no kernel.
    """
    keys = torch._C.DispatchKey
    higher = torch._C._dispatch_keyset_full() - torch._C._dispatch_keyset_full_after(keys.Python)
    excluded = torch._C._dispatch_tls_local_exclude_set() - higher
    for kept in (keys.AutocastCPU, keys.AutocastCUDA):  # the parts choose their precision themselves
        excluded = excluded.add(kept)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.no_grad():
        yield


@answered_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, place: int, scale: float | None) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width)).transpose(1, 2)


# --- windows


@dataclass(frozen=True, eq=False)
class Laid:
    """Tokens in an order of squares [N], where each of them went [N], and which blocks of them see each other. None and None
    where the model's own order does."""

    order: Tensor | None
    places: Tensor | None
    mask: BlockMask


@lru_cache(maxsize=64)
def laid_out(window: Window, pool: int, grid: Grid, device: torch.device) -> Laid:
    """For a picture of that size; `pool`: patches of which there are keys behind those of the tokens, 0 for none."""
    places = np.indices(grid.sides).reshape(3, -1)
    square = np.zeros_like(places[0])
    for along, length, side in zip(places, grid.sides, _SQUARE if grid.frames == 1 else _CUBE, strict=True):
        square = square * -(-length // side) + along // side
    image = np.lexsort((*reversed(places), square))
    if grid.order is not None:
        places, image = places[:, grid.order.listed(*grid.sides)], np.arange(grid.image)
    text = np.arange(grid.text)
    order = np.concatenate((text, image + grid.text) if grid.text_first else (image, text + grid.image))
    nowhere = np.full(grid.text, -1)
    pooled = len(patches(pool, *grid.sides)) if pool else 0

    def of_tokens(array: np.ndarray, of_text: int) -> np.ndarray:
        parts = (nowhere * 0 + of_text, array[image])
        return np.concatenate(parts if grid.text_first else parts[::-1])

    kind = np.concatenate((of_tokens(square * 0 + _IMAGE, _TEXT), np.full(pooled, _POOLED)))
    of_keys = (np.concatenate((of_tokens(along, 0), np.zeros(pooled, int))) for along in places)
    kinds, *at = (torch.from_numpy(array).to(device, torch.int32) for array in (kind, *of_keys))
    sees = _in_window(window, grid, at)

    def seen(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        by_image = (kinds[key] != _IMAGE) | sees(query, key)
        return torch.where(kinds[query] == _TEXT, kinds[key] != _POOLED, by_image)

    mask = _by_blocks(seen, len(order), len(kind), device)
    if grid.order is not None:
        return Laid(None, None, mask)
    went = np.argsort(order)
    return Laid(torch.from_numpy(order).to(device), torch.from_numpy(went).to(device), mask)


def _by_blocks(seen: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> BlockMask:
    """The mask with its blocks found, 128 queries at a time: whole, a mask of 65,536 tokens would take gigabytes."""
    none = torch.zeros((), dtype=torch.int64, device=device)
    key = torch.arange(keys, device=device)
    beyond = -keys % _BLOCK
    any_seen, all_seen = [], []
    for start in range(0, queries, _BLOCK):
        stop = min(start + _BLOCK, queries)
        query = torch.arange(start, stop, device=device)
        # What lies beyond the last token is not seen, so that a block that reaches there is never taken whole.
        padding = (0, beyond, 0, start + _BLOCK - stop)
        blocks = F.pad(seen(none, none, query[:, None], key[None]), padding).unflatten(1, (-1, _BLOCK))
        any_seen.append(blocks.any(2).any(0))
        all_seen.append(blocks.all(2).all(0))
    some, full = torch.stack(any_seen), torch.stack(all_seen)
    numbers = [_numbered(some & ~full), _numbered(full)]
    return BlockMask.from_kv_blocks(
        *numbers[0], *numbers[1], BLOCK_SIZE=_BLOCK, mask_mod=seen, seq_lengths=(queries, keys)
    )


def _numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, K] -> how many blocks each row has [1, 1, Q], and the numbers of all, of these first [1, 1, Q, K]."""
    which = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).to(torch.int32)[None, None], which.to(torch.int32)[None, None].contiguous()


Sees = Callable[[Tensor, Tensor], Tensor]
"""(number of a query, of a key) -> whether the one sees the other, both image tokens."""


def _in_window(window: Window, grid: Grid, along: Sequence[Tensor]) -> Sees:
    """Of tokens at these places along frames, rows and columns."""
    frames, rows, columns = (_in_side(*of_side) for of_side in zip(window.sides, along, grid.sides, strict=True))

    def in_circle(query: Tensor, key: Tensor) -> Tensor:
        down, right = (places[query] - places[key] for places in along[1:])
        return down * down + right * right < window.size**2

    def sees(query: Tensor, key: Tensor) -> Tensor:
        found = in_circle(query, key) if window.shape == "circle" else rows(query, key) & columns(query, key)
        return found & frames(query, key) if grid.frames > 1 else found

    return sees


def _in_side(side: Side, places: Tensor, length: int) -> Sees:
    """Of tokens at these places along one side."""
    firsts = (places // side.tile * side.tile - side.before).clamp(0, max(length - side.extent, 0))
    extent = side.extent

    def sees(query: Tensor, key: Tensor) -> Tensor:
        beyond = places[key] - firsts[query]
        return (beyond >= 0) & (beyond < extent)

    return sees


@lru_cache
def _compiled(function: Callable[..., Tensor], compiles: bool) -> Callable[..., Tensor]:
    """By torch's compiler, if that is wanted, one for the parts of all layers and for pictures of all sizes."""
    return with_limits(torch.compile(function, fullgraph=True, dynamic=False)) if compiles else function


def windowed(query: Tensor, key: Tensor, value: Tensor, laid: Laid, scale: float, extra: list[Tensor]) -> Tensor:
    """Attention of tokens [B, h, N, d] to those that each sees, with `extra` keys and values behind them."""
    # On a CPU, where the tests compare it with the meaning, it is torch's own in floating point, without a compiler.
    ordered = _compiled(_in_order, query.is_cuda)
    return ordered(query, key, value, laid.order, laid.places, laid.mask, scale, *extra)


def _in_order(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor | None,
    places: Tensor | None,
    mask: BlockMask,
    scale: float,
    more_keys: Tensor | None = None,
    more_values: Tensor | None = None,
) -> Tensor:
    """Attention of tokens in another order, which is compiled with it: there tokens are copied, and written as the model reads
    them, [B, N, h, d] in memory.
    """
    if order is not None:
        query, key, value = (tensor[:, :, order] for tensor in (query, key, value))
    if more_keys is not None and more_values is not None:
        key, value = torch.cat((key, more_keys.to(key)), -2), torch.cat((value, more_values.to(value)), -2)
    y = flex_attention(query, key, value, block_mask=mask, scale=scale)
    assert isinstance(y, Tensor)
    y = y.transpose(1, 2)
    return (y if places is None else y[:, places]).contiguous().transpose(1, 2)


Attention = Callable[[Tensor, Tensor, Tensor, Grid, float], Tensor]


def _local(part: TokenAttention) -> Attention:
    assert isinstance(part, LocalAttention)

    def of_heads(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: Grid,
        window: Window | None,
        scale: float,
        pooling: Pooling | None,
    ) -> Tensor:
        if window is None:
            return F.scaled_dot_product_attention(query, key, value, scale=scale)
        extra = []
        if pooling is not None:
            for tokens, weights in ((key, pooling.keys), (value, pooling.values)):
                extra.append(pooling.pooled(grid.parted(tokens)[0], weights, grid))
        laid = hold(laid_out(window, part.pool, grid, query.device))
        return windowed(query, key, value, laid, scale, extra)

    def attention(query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        return by_heads(of_heads, query, key, value, grid, part.groups, part.order, scale, part.pooling)

    return attention


def _linear(part: TokenAttention) -> Attention:
    assert isinstance(part, LinearAttention)
    form = part.form()
    # The gathers of a window are by constant indices, which lie on the device already; a trace would copy them anew.
    compute = _compiled(linear_attention, part.query_map.is_cuda and form.window is None)

    def attention(query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        with _on_tensor_cores():
            return compute(query, key, value, grid, scale, form)

    return attention


@contextmanager
def _on_tensor_cores() -> Iterator[None]:
    """Products in TF32, whose 11 bits hold the model's bfloat16 exactly and round features by 2^-12; sums in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _tiles(part: TokenAttention) -> Attention:
    """As meant, but for large pictures without gathering keys."""
    assert isinstance(part, (SparseAttention, HeldTiles))
    if tiled_attention.block_of(part.tile) is not None:
        part.over_tiles = _over_tiles  # type: ignore[method-assign,assignment]
    return _as_meant(part)


def _over_tiles(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float, tile: int, keep: int, seen: Tensor | None, means: bool
) -> Tensor:  # fmt: skip
    """`sparse_attention`, by FlexAttention where there are many tokens."""
    if grid.image < tiled_attention.LEAST:
        return sparse_attention(query, key, value, grid, scale, tile, keep, seen, means)
    compute = _compiled(tiled_attention.image_over_tiles, query.is_cuda)
    image = compute(*tiled_attention.arguments(query, key, value, grid, scale, tile, keep, seen, means))
    if not grid.text:
        return image
    return grid.joined(image, F.scaled_dot_product_attention(grid.parted(query)[1], key, value, scale=scale))


def _as_meant(part: TokenAttention) -> Attention:
    """By torch's operators as its numerics are written: gathers and torch's own attention."""
    return type(part).attention.__get__(part)


KINDS: dict[type[TokenAttention], Callable[[TokenAttention], Attention]] = {
    LocalAttention: _local,
    LinearAttention: _linear,
    CompressedKeys: _as_meant,
    SparseAttention: _tiles,
    HeldTiles: _tiles,
}
