"""Softmax attention in which image queries see a window of the picture, all text, and if wanted the picture in small.

    Keep(q, k) = q is text, or k is text, or k lies in the window of q

(CLEAR, Liu 2024, arXiv 2412.16112). Cost: keys of a window times queries, instead of tokens squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.portions import joined, portions
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Blocks, Window, blocks, patches


@dataclass(frozen=True, eq=False)
class Pooling:
    """Every patch x patch image tokens as one key and value more: sums with weights [heads, patch^2] that add up to 1.

    Because they add up to 1, a shift common to all values still passes through the attention.
    """

    patch: int
    keys: Tensor
    values: Tensor

    def pooled(self, tokens: Tensor, weights: Tensor, grid: Grid) -> Tensor:
        """Image tokens [B, h, FHW, d] -> [B, h, P, d]."""
        found = tokens[:, :, on(tokens, patches(self.patch, *grid.sides, order=grid.order))]  # [B, h, P, patch^2, d]
        shares = weights / weights.sum(-1, keepdim=True)
        return (found * shares[:, None, :, None]).sum(3)


def temperature(tokens: int, usual: int) -> float:
    """What scores are multiplied by where there are more tokens than the model is used to, sqrt(log N / log N_0).

    Their entropy grows with the number of keys, and this takes it back (CLEAR, section 3.4).
    """
    return math.sqrt(max(1.0, math.log(tokens) / math.log(usual))) if usual > 1 else 1.0


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    window: Window | None,
    scale: float,
    pooling: Pooling | None = None,
) -> Tensor:
    """softmax over what each query sees: query, key, value [B, h, N, d] -> [B, h, N, d]. Without a window that is all."""
    if window is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    (image_query, text_query), (image_key, text_key) = grid.parted(query), grid.parted(key)
    image_value, text_value = grid.parted(value)
    seen_by_all = (text_key, text_value)
    if pooling is not None:
        small = (pooling.pooled(image_key, pooling.keys, grid), pooling.pooled(image_value, pooling.values, grid))
        seen_by_all = (torch.cat([text_key, small[0]], -2), torch.cat([text_value, small[1]], -2))
    image = windowed(image_query, image_key, image_value, *seen_by_all, grid, window, scale)
    if not grid.text:
        return image
    return grid.joined(image, F.scaled_dot_product_attention(text_query, key, value, scale=scale))


def windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    common_key: Tensor,
    common_value: Tensor,
    grid: Grid,
    window: Window,
    scale: float,
) -> Tensor:
    """Image queries over the image keys of their window and over keys common to all: [B, h, FHW, d] and [B, h, G, d]."""
    batch, heads, _, width = query.shape
    made = blocks(window, *grid.sides, order=grid.order)
    queries = in_blocks(query, made)  # [B, h, T, Q, d]
    gathered = 2 * batch * heads * (made.keys.shape[1] + common_key.shape[-2]) * width  # elements a block
    found = [
        _of_blocks(queries[:, :, some], key, value, common_key, common_value, made, some, scale)
        for some in portions(query, len(made.keys), gathered)
    ]
    return out_of_blocks(joined(found, 2).flatten(2, 3), made)


def _of_blocks(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    common_key: Tensor,
    common_value: Tensor,
    made: Blocks,
    some: slice,
    scale: float,
) -> Tensor:
    """The queries [B, h, T, Q, d] of some of the blocks over what each sees: of the same shape."""
    parts = [queries]
    for image, common in ((key, common_key), (value, common_value)):
        gathered = image[:, :, on(image, made.keys)[some]]  # [B, h, T, K, d]
        everywhere = common[:, :, None].expand(-1, -1, gathered.shape[2], -1, -1)
        parts.append(torch.cat([gathered, everywhere], -2) if common.shape[-2] else gathered)
    mask = None
    if made.seen is not None:
        seen = on(queries, made.seen)[some]
        mask = torch.cat([seen, seen.new_ones(*seen.shape[:2], common_key.shape[-2])], -1)[None]
    query, key, value = (part.flatten(0, 1) for part in parts)  # [B h, T, Q, d], T in the place of heads
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).unflatten(
        0, queries.shape[:2]
    )


def in_blocks(tokens: Tensor, made: Blocks) -> Tensor:
    """Queries of each block, [B, h, FHW, d] -> [B, h, T, Q, d]: a copy only where they do not lie so."""
    if made.in_place:
        return tokens.unflatten(2, made.queries.shape)
    return tokens[:, :, on(tokens, made.queries)]


def out_of_blocks(tokens: Tensor, made: Blocks) -> Tensor:
    """[B, h, T Q, d] -> [B, h, FHW, d], what `in_blocks` repeated once."""
    return tokens if made.in_place else tokens[:, :, on(tokens, made.places)]


_elsewhere: dict[
    tuple[int, torch.device], tuple[np.ndarray, Tensor]
] = {}  # with the array, so that its id stays its own


def on(tensor: Tensor, array: np.ndarray) -> Tensor:
    """The array as a tensor on that tensor's device, where a copy of it stays: calls that are recorded must copy nothing."""
    device = tensor.device
    if device.type == "cpu":
        return torch.from_numpy(array)
    if (id(array), device) not in _elsewhere:
        with torch.inference_mode(False):
            _elsewhere[id(array), device] = (array, torch.from_numpy(array).to(device))
    return _elsewhere[id(array), device][1]
