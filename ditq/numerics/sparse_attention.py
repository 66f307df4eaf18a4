"""Softmax attention in which the queries of a tile of the picture see some tiles of keys, each head its own, and all text.

Which ones is found at each call from the means of the tiles (as block-sparse attentions do that need no training: SpargeAttn,
Zhang 2025, arXiv 2502.18137), or was found on recorded calls, by the probability that tiles got (AdaSpa, Xia 2025, arXiv
2502.21079). Their number is the same for all tiles and heads, so that all shapes are known.

What a query does not see is left out, or stands as one key and value a tile, the means of its n tokens, weighed n times (the
first term of the expansion in PISA, Li 2026, arXiv 2602.01077):

    y = (sum_seen exp(q k_j) v_j + sum_unseen n exp(q mean k) mean v) / (sum_seen exp(q k_j) + sum_unseen n exp(q mean k))

which is exact where the keys of a tile are alike. Beyond an edge the last row and column stand again in a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.compressed_keys import log_counts
from ditq.numerics.local_attention import in_blocks, on, out_of_blocks
from ditq.numerics.portions import joined, portions
from ditq.numerics.token_layout import Grid
from ditq.numerics.token_order import TokenOrder
from ditq.numerics.window import Blocks, Window, blocks, number_of_patches

SCORES = 2**25  # at once, of queries and keys, where probabilities are summed


@dataclass(frozen=True, eq=False)
class Tiles:
    """Of a picture, or of each frame of a video: the `blocks` of windows that are the own tile alone; `real` [T, t^2]: not a
    last row or column that stands again beyond an edge; None where all are.
    """

    blocks: Blocks
    real: np.ndarray | None

    @property
    def tokens(self) -> np.ndarray:
        """Of each tile: int64 [T, t^2]."""
        return self.blocks.queries

    @property
    def places(self) -> np.ndarray:
        """Where each token is found among them: int64 [FHW]."""
        return self.blocks.places


@lru_cache(maxsize=64)
def tiles_of(tile: int, *sides: int, order: TokenOrder | None = None) -> Tiles:
    """The tiles of tile x tile tokens of a picture or of the frames of a video."""
    made = blocks(Window("tiles", 1, tile), *sides, order=order)
    real = made.places[made.queries] == np.arange(made.queries.size).reshape(made.queries.shape)
    return Tiles(made, None if real.all() else real)


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
    made = tiles_of(tile, *grid.sides, order=grid.order)
    members = F.one_hot(on(query, made.places) // tile**2, len(made.tokens)).float()  # [FHW, T]
    queries, keys = grid.parted(query)[0].float() * scale, key.float()
    found = members.new_zeros(*query.shape[:2], len(made.tokens), len(made.tokens))
    at_once = max(1, SCORES // key.shape[2])  # queries
    for sample, head in np.ndindex(*query.shape[:2]):
        for part, of_tiles in zip(queries[sample, head].split(at_once), members.split(at_once), strict=True):
            weights = (part @ keys[sample, head].T).softmax(-1)
            found[sample, head] += of_tiles.T @ (grid.parted(weights.T)[0].T @ members)
    found = found / members.sum(0)[:, None]
    return found, 1 - found.sum(-1)


def most_probable(query: Tensor, key: Tensor, grid: Grid, scale: float, tile: int, keep: int) -> Tensor:
    """The `keep` tiles of keys that get the most of the probability, of all tiles of queries: int64 [B, h, T, keep]."""
    found, _ = tile_probabilities(query, key, grid, tile, scale)
    return found.topk(min(keep, found.shape[-1]), sorted=False).indices


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
    means: bool = False,
) -> Tensor:
    """query, key, value [B, h, N, d] -> [B, h, N, d].

    seen: the tiles [h, T, keep], or of each sample [B, h, T, keep], that the queries of each tile see. None: the `keep` of the
    highest `tile_scores`, the tile itself among them; all, if there are no more. Text sees and is seen by all. means: other
    tiles are seen by their means.
    """
    (image_query, text_query), (image_key, text_key) = grid.parted(query), grid.parted(key)
    image_value, text_value = grid.parted(value)
    made = tiles_of(tile, *grid.sides, order=grid.order)
    tokens = made.tokens
    queries, keys, values = (
        in_blocks(image, made.blocks) for image in (image_query, image_key, image_value)
    )  # [B, h, T, t^2, d]
    if seen is None:
        seen = tile_scores(queries, keys).topk(min(keep, len(tokens)), sorted=False).indices
    else:
        seen = seen.long().expand(query.shape[0], -1, -1, -1)
    of_all = [(text_key, text_value)]
    if means:
        of_all.append((keys.mean(3), values.mean(3)))
    common_key, common_value = (joined(parts, -2) for parts in zip(*of_all, strict=True))
    keys_a_tile = seen.shape[-1] * tile**2 + common_key.shape[-2]
    found = []
    for some in portions(query, len(tokens), 2 * query.shape[:2].numel() * keys_a_tile * query.shape[-1]):
        mask = _mask(made, seen[:, :, some], text_key.shape[-2], grid, tile, means)
        found.append(
            _of_some(queries[:, :, some], keys, values, common_key, common_value, seen[:, :, some], mask, scale)
        )
    image = out_of_blocks(joined(found, 2).flatten(2, 3), made.blocks)
    if not grid.text:
        return image
    return grid.joined(image, F.scaled_dot_product_attention(text_query, key, value, scale=scale))


def _of_some(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    common_key: Tensor,
    common_value: Tensor,
    seen: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Queries of some tiles [B, h, T, t^2, d] over the tiles that they see and keys common to all [B, h, G, d]."""
    parts = [queries]
    for tiled, common in ((keys, common_key), (values, common_value)):
        everywhere = common[:, :, None].expand(-1, -1, seen.shape[2], -1, -1)
        parts.append(torch.cat([_of_tiles(tiled, seen), everywhere], -2))
    added = None if mask is None else mask[..., None, :].flatten(0, 1).to(queries.dtype)
    query, key, value = (part.flatten(0, 1) for part in parts)  # T in the place of heads
    return F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale).unflatten(
        0, queries.shape[:2]
    )


def _mask(made: Tiles, seen: Tensor, text: int, grid: Grid, tile: int, means: bool) -> Tensor | None:
    """What is added to scores of queries of each tile [B, h, T, ..]: over tokens of seen tiles, text and, with `means`, all
    tiles' means. None where that is nothing."""
    if made.real is None and not means:
        return None
    added = torch.zeros(*seen.shape[:-1], seen.shape[-1] * tile**2 + text, device=seen.device)
    if made.real is not None:
        beyond = F.pad(~on(seen, made.real)[seen].flatten(-2), (0, text))
        added = added.masked_fill(beyond, -torch.inf)
    if not means:
        return added
    counts = on(seen, log_counts(tile, *grid.sides)).expand(*seen.shape[:2], seen.shape[2], -1)
    return torch.cat([added, counts.scatter(-1, seen, -torch.inf)], -1)


def _of_tiles(tiled: Tensor, seen: Tensor) -> Tensor:
    """Tokens of tiles [B, h, T, t^2, d] that each tile sees [B, h, T, k]: [B, h, T, k t^2, d]."""
    batch, heads, count, size, width = tiled.shape
    rows = torch.arange(batch * heads, device=tiled.device).view(batch, heads, 1, 1) * count
    return tiled.reshape(-1, size, width)[seen + rows].flatten(3, 4)
