"""Chosen tiles of large pictures by FlexAttention, which gathers nothing: numerics/sparse_attention.py has the meaning.

Keys lie tile by tile, behind them those of the text and the means of all tiles. A tile of 64 tokens or more is a block of keys
or several, so what a tile of queries sees is whole blocks of the picture, and a few at the end in which a mask tells the means
of tiles that it does not see. Gathered keys and values would take gigabytes: each is seen by as many tiles as a tile sees.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ditq.numerics.compressed_keys import log_counts
from ditq.numerics.local_attention import in_blocks, on
from ditq.numerics.sparse_attention import tile_scores, tiles_of
from ditq.numerics.token_layout import Grid

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

_BLOCKS = (128, 64)  # tokens of a block of queries or keys, the best first
LEAST = 16384  # image tokens from which it is done: keys and values of FLUX's heads would take 1.8 GB for 9 tiles of 64


def block_of(tile: int) -> int | None:
    """Tokens of the blocks that tiles of tile x tile tokens are made of; None where they are made of none."""
    return next((size for size in _BLOCKS if tile**2 % size == 0), None)


def arguments(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float, tile: int, keep: int, seen: Tensor | None, means: bool
) -> tuple[object, ...]:  # fmt: skip
    """What `image_over_tiles` takes, of what `sparse_attention` does: index arrays are on the device and stay there.

    What is seen is found here: a mask that the same compiled function fills may be read before it is filled.
    """
    made = tiles_of(tile, *grid.sides, order=grid.order)
    if seen is None:
        queries, keys = (in_blocks(grid.parted(tensor)[0], made.blocks) for tensor in (query, key))
        seen = tile_scores(queries, keys).topk(min(keep, len(made.tokens)), sorted=False).indices
    seen = seen.long().expand(query.shape[0], -1, -1, -1)
    sees = torch.zeros(*seen.shape[:3], seen.shape[2], dtype=torch.bool, device=query.device).scatter(-1, seen, True)
    order, places = (
        (None, None) if made.blocks.in_place else (on(query, made.tokens.reshape(-1)), on(query, made.places))
    )
    real = None if made.real is None else on(query, made.real.reshape(-1))
    counts = on(query, log_counts(tile, *grid.sides)) if means and real is not None else None
    images, texts = zip(*(grid.parted(tensor) for tensor in (query, key, value)), strict=True)
    return (*images, *texts[1:], order, places, real, counts, seen, sees, scale, tile, means)


def image_over_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    order: Tensor | None,
    places: Tensor | None,
    real: Tensor | None,
    counts: Tensor | None,
    seen: Tensor,
    sees: Tensor,
    scale: float,
    tile: int,
    means: bool,
) -> Tensor:
    """Attention of image queries [B, h, FHW, d], with image and text keys and values.

    order, places: tokens tile by tile [T t^2], and where each token of the picture is found among them [FHW]; None where they
    lie so. real [T t^2]: as in `Tiles`. counts [T]: logarithms of the tiles' tokens; None: all have t^2. seen [B, h, T, k]:
    tiles of keys that those of queries see; sees: the same as a mask [B, h, T, T].
    """
    if order is not None:
        query, key, value = (tensor[:, :, order] for tensor in (query, key, value))
    size, block = tile**2, block_of(tile)
    assert block is not None
    image, text = query.shape[2], text_key.shape[2]
    tiles = image // size
    rest = text + tiles * means
    parts = []
    for tokens, of_text in ((key, text_key), (value, text_value)):
        behind = [of_text, tokens.unflatten(2, (tiles, size)).mean(3)] if means else [of_text]
        parts.append(F.pad(torch.cat([tokens, *behind], 2), (0, 0, 0, -rest % block)))

    def seen_keys(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        of_image = column < image
        which = torch.where(of_image, column // size, column - image - text).clamp(0, tiles - 1)
        found = sees[sample, head, row // size, which]
        inside = found if real is None else found & real[column.clamp(max=image - 1)]
        outside = (column < image + text) | ((column < image + rest) & ~found)
        return torch.where(of_image, inside, outside)

    def weighed(score: Tensor, sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        first = image + text
        count = math.log(size) if counts is None else counts[(column - first).clamp(0, tiles - 1)]
        return torch.where(column < first, score, score + count)

    count, which, count_whole, which_whole = _blocks(seen, size // block, tiles, -(-rest // block), real is None)
    mask = BlockMask(  # which queries each key has, only gradients ask for
        seq_lengths=(image, parts[0].shape[2]),
        kv_num_blocks=count,
        kv_indices=which,
        full_kv_num_blocks=count_whole,
        full_kv_indices=which_whole,
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block, block),
        mask_mod=seen_keys,
    )
    options: FlexKernelOptions | None = {"BLOCK_M": block, "BLOCK_N": 64} if query.is_cuda else None
    y = flex_attention(
        query,
        parts[0],
        parts[1],
        score_mod=weighed if means else None,
        block_mask=mask,
        scale=scale,
        kernel_options=options,
    )
    assert isinstance(y, Tensor)
    return y if places is None else y[:, :, places]


def _blocks(
    seen: Tensor, each: int, tiles: int, behind: int, whole: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """How many blocks of keys are masked for each block of queries [B, h, Q], and which [B, h, Q, ..]; the same of those that
    are seen whole, or None and None.

    seen [B, h, T, k]; each: blocks of a tile; behind: those of text and means; whole: whether seen tiles are. Both tables have
    as many columns: FlexAttention's kernel of some versions of torch, as of 2.11, finds the rows of the second by the strides
    of the first.
    """
    inner = torch.arange(each, device=seen.device, dtype=torch.int32)
    image = (seen.to(torch.int32)[..., None] * each + inner).flatten(3).repeat_interleave(each, 2).contiguous()
    last = tiles * each + torch.arange(behind, device=seen.device, dtype=torch.int32)
    common = last.expand(*image.shape[:3], behind)
    count = torch.full(image.shape[:3], image.shape[3], device=seen.device, dtype=torch.int32)
    if not whole:
        both = torch.cat([image, common], 3)
        return count + behind, both, None, None
    columns = max(image.shape[3], behind)
    masked, full = (F.pad(table, (0, columns - table.shape[3])) for table in (common, image))
    return torch.full_like(count, behind), masked.contiguous(), count, full.contiguous()
