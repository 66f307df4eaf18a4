"""Softmax attention whose image keys and values are sums over squares of the picture; queries and text stay as they are.

    y_i = sum_j exp(q_i k_j + b_j) v_j / sum_j exp(q_i k_j + b_j)      j: text tokens (b = 0) and squares (b = log n + g)

(token compression of keys and values in PixArt-Sigma, Chen 2024, arXiv 2403.04692, section 3.3, as a depthwise convolution of
stride `patch`). `n` equal keys in one softmax weigh n exp(s), hence log n. Cost: a square's share of the multiply-adds.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.local_attention import Pooling, on
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import three


@lru_cache(maxsize=64)
def log_counts(patch: int, *sides: int) -> np.ndarray:
    """log of how many tokens each patch x patch square of a frame has: float32 [P]. At an edge there may be fewer."""
    frames, height, width = three(sides)
    rows, columns = (np.minimum(patch, length - patch * np.arange(-(-length // patch))) for length in (height, width))
    return np.tile(np.log(rows[:, None] * columns[None]).astype(np.float32).reshape(-1), frames)


def is_even(patch: int, grid: Grid) -> bool:
    """Whether all keys are squares of the same number of tokens: what is added to their scores is cancelled by the softmax."""
    return bool(not grid.text and grid.height % patch == 0 and grid.width % patch == 0)


def compressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    scale: float,
    pooling: Pooling,
    count: bool = True,
    gain: Tensor | None = None,
) -> Tensor:
    """query, key, value [B, h, N, d] -> [B, h, N, d].

    count: whether log n is added to the scores of squares; gain [h]: what is added beside it.
    """
    (image_key, text_key), (image_value, text_value) = grid.parted(key), grid.parted(value)
    keys = torch.cat([text_key, pooling.pooled(image_key, pooling.keys, grid).to(key.dtype)], -2)
    values = torch.cat([text_value, pooling.pooled(image_value, pooling.values, grid).to(value.dtype)], -2)
    mask = None
    if (count or gain is not None) and not is_even(pooling.patch, grid):
        logs = on(query, log_counts(pooling.patch, *grid.sides)) * float(count)
        added = logs[None] if gain is None else logs + gain[:, None]  # [h or 1, P]
        mask = F.pad(added, (grid.text, 0))[:, None].to(query.dtype)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
