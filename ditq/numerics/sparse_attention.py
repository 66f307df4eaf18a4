"""Softmax attention in which the queries of a tile of the picture see some tiles of keys, each head its own, and all text.

Which ones is found at each call from the means of the tiles (as block-sparse attentions do that need no training: SpargeAttn,
Zhang 2025, arXiv 2502.18137), or was found on recorded calls, by the probability that tiles got (AdaSpa, Xia 2025, arXiv
2502.21079). Their number is the same for all tiles and heads, so that all shapes are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.local_attention import on
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Window, blocks, number_of_patches


@dataclass(frozen=True, eq=False)
class Tiles:
    """Of a picture, or of each frame of a video: `tokens` [T, t^2] of each tile; `places` [FHW], where each token is found
    among them; `real` [T, t^2]: not a last row or column that stands again beyond an edge; None where all are.
    """

    tokens: np.ndarray
    places: np.ndarray
    real: np.ndarray | None


@lru_cache(maxsize=64)
def tiles_of(tile: int, *sides: int) -> Tiles:
    """The tiles of tile x tile tokens of a picture or of the frames of a video."""
    made = blocks(Window("tiles", 1, tile), *sides)
    real = made.places[made.queries] == np.arange(made.queries.size).reshape(made.queries.shape)
    return Tiles(made.queries, made.places, None if real.all() else real)


def number_of_tiles(tile: int, *sides: int) -> int:
    """T."""
    return number_of_patches(tile, *sides)


def tile_scores(query: Tensor, key: Tensor) -> Tensor:
    """Mean queries times mean keys of tiles [B, h, T, t^2, d], in float32 at least: [B, h, T, T]; infinite for the own tile.

    The mean score of all pairs of two tiles is just that.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    means = (tokens.to(dtype).mean(3) for tokens in (query, key))
    scores = next(means) @ next(means).transpose(-1, -2)
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return scores.masked_fill(own, torch.inf)


def tile_probabilities(query: Tensor, key: Tensor, grid: Grid, tile: int, scale: float) -> tuple[Tensor, Tensor]:
    """Of softmax over all tokens [B, h, N, d], the probability that a query of each tile gives each tile of keys, in the mean
    [B, h, T, T], and all text [B, h, T].
    """
    made = tiles_of(tile, *grid.sides)
    tile_of = on(query, made.places) // tile**2
    members = F.one_hot(tile_of, len(made.tokens)).to(query.dtype)  # [FHW, T]
    queries = grid.parted(query)[0]
    found = query.new_empty(*query.shape[:2], len(made.tokens), len(made.tokens))
    for sample, head in np.ndindex(*query.shape[:2]):  # one matrix of tokens times tokens at a time
        weights = (queries[sample, head] @ key[sample, head].T * scale).softmax(-1)
        found[sample, head] = members.T @ (grid.parted(weights.T)[0].T @ members)
    found = found / members.sum(0)[:, None]
    return found, 1 - found.sum(-1)


def covered(probabilities: Tensor, of_text: Tensor, order: Tensor) -> Tensor:
    """What share of the probability [.., T, T] the first 1, 2, .. T tiles of `order` [.., T, T] have with the text, in the mean
    over all else: [T]."""
    sums = probabilities.gather(-1, order.expand_as(probabilities)).cumsum(-1) + of_text[..., None]
    return sums.mean(tuple(range(sums.dim() - 1)))


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    scale: float,
    tile: int,
    keep: int,
    seen: Tensor | None = None,
) -> Tensor:
    """query, key, value [B, h, N, d] -> [B, h, N, d].

    seen: the tiles [h, T, keep] that the queries of each tile see. None: the `keep` of the highest `tile_scores`, the tile
    itself among them; all, if there are no more. Text sees and is seen by all.
    """
    (image_query, text_query), (image_key, text_key) = grid.parted(query), grid.parted(key)
    image_value, text_value = grid.parted(value)
    made = tiles_of(tile, *grid.sides)
    tokens = on(query, made.tokens)
    queries, keys, values = (
        image[:, :, tokens] for image in (image_query, image_key, image_value)
    )  # [B, h, T, t^2, d]
    if seen is None:
        seen = tile_scores(queries, keys).topk(min(keep, len(tokens)), sorted=False).indices
    else:
        seen = seen.long().expand(query.shape[0], -1, -1, -1)
    parts = [queries]
    for tiled, text in ((keys, text_key), (values, text_value)):
        gathered = _of_tiles(tiled, seen)
        everywhere = text[:, :, None].expand(-1, -1, len(tokens), -1, -1)
        parts.append(torch.cat([gathered, everywhere], -2) if text.shape[-2] else gathered)
    mask = None
    if made.real is not None:
        real = on(query, made.real)[seen].flatten(-2)  # [B, h, T, keep t^2]
        mask = F.pad(real, (0, text_key.shape[-2]), value=True)[:, :, :, None].flatten(0, 1)
    queries, keys, values = (part.flatten(0, 1) for part in parts)  # T in the place of heads
    y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    image = y.reshape(*query.shape[:2], -1, y.shape[-1])[:, :, on(query, made.places)]
    if not grid.text:
        return image
    return grid.joined(image, F.scaled_dot_product_attention(text_query, key, value, scale=scale))


def _of_tiles(tiled: Tensor, seen: Tensor) -> Tensor:
    """Tokens of tiles [B, h, T, t^2, d] that each tile sees [B, h, T, k]: [B, h, T, k t^2, d]."""
    batch, heads, count, size, width = tiled.shape
    rows = torch.arange(batch * heads, device=tiled.device).view(batch, heads, 1, 1) * count
    return tiled.reshape(-1, size, width)[seen + rows].flatten(3, 4)
