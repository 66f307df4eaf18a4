"""Attention without a softmax over the picture: with features phi in its place, sums over keys are made once for all queries.

    y = phi(q) sum_j phi(k_j)^T v_j / (phi(q) sum_j phi(k_j)^T)

(Katharopoulos 2020, arXiv 2006.16236). 2 N d F multiply-adds a head for F features instead of 2 N^2 d. Text and, if wanted, a
window of the picture keep their softmax. All sums are in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.local_attention import in_blocks, local_attention, on, out_of_blocks
from ditq.numerics.portions import joined, portions
from ditq.numerics.token_layout import Grid
from ditq.numerics.window import Window, blocks

Features = Literal["relu", "elu", "softmax"]
FEATURES: tuple[Features, ...] = ("relu", "elu", "softmax")
SMALLEST = 1e-12  # added to what is divided by; all features of a query may be 0


def features(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """phi(x W) of x [B, h, N, d] with W [h, d, d], none below 0: [B, h, N, d], or 2 d of them for `softmax`.

    relu (Sana, Xie 2024, arXiv 2410.10629), elu + 1 (Katharopoulos 2020), or softmax over the channels of y and of -y
    (Hedgehog, Zhang 2024, arXiv 2402.04347).
    """
    y = x @ weight
    if kind == "relu":
        return F.relu(y)
    if kind == "elu":
        return F.elu(y) + 1
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


@dataclass(frozen=True, eq=False)
class Mass:
    """Values summed with weights, [B, h, N, d], and the sum of the weights [B, h, N, 1].

    Of a softmax, weights are divided by the exponential of `largest` [B, h, N, 1], the largest score.
    """

    values: Tensor
    total: Tensor
    largest: Tensor | None = None

    def mean(self) -> Tensor:
        return self.values / (self.total + SMALLEST)


def softmax_mass(query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: Window | None, scale: float) -> Mass:
    """exp(s - max s) of image queries over text keys and the image keys of their window; key and value [B, h, N, d]."""
    image_query, _ = grid.parted(query)
    (image_key, text_key), (image_value, text_value) = grid.parted(key), grid.parted(value)
    if window is None:
        scores = image_query @ text_key.transpose(-1, -2) * scale
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp()
        return Mass(weights @ text_value, weights.sum(-1, keepdim=True), largest)
    made = blocks(window, *grid.sides, order=grid.order)
    queries = in_blocks(image_query, made)  # [B, h, T, Q, d]
    own = queries @ image_key[:, :, on(query, made.keys)].transpose(-1, -2) * scale
    if made.seen is not None:
        own = own.masked_fill(~on(query, made.seen), -torch.inf)
    common = queries @ text_key[:, :, None].transpose(-1, -2) * scale
    scores = torch.cat([own, common], -1)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    of_own, of_common = weights.split([own.shape[-1], common.shape[-1]], -1)
    values = of_own @ image_value[:, :, on(query, made.keys)] + of_common @ text_value[:, :, None]
    return Mass(*(out_of_blocks(t.flatten(2, 3), made) for t in (values, weights.sum(-1, keepdim=True), largest)))


@dataclass(frozen=True, eq=False)
class LinearForm:
    """How image queries see the picture.

    Attributes:
        kind: of the features; query_map, key_map [h, d, d]: what queries and keys are multiplied by before.
        window: image keys under softmax; None: none.
        gain: [h], logarithm of what the linear part's weights are multiplied by beside those of the softmax, in one normaliser
            (LoLCATs, Zhang 2024, arXiv 2410.10254). None where there is no softmax.
        projection: [h, d, d]; given, the linear part is multiplied by it and added to attention to the window and the text,
            instead of sharing a normaliser (SLA, Zhang 2025, arXiv 2509.24006).
        locality: [h d, 1, 3, 3], a depthwise convolution of a picture's values that is added (EfficientViT, Cai 2022, arXiv
            2205.14756); None: none.
    """

    kind: str
    query_map: Tensor
    key_map: Tensor
    window: Window | None = None
    gain: Tensor | None = None
    projection: Tensor | None = None
    locality: Tensor | None = None


def linear_attention(query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float, form: LinearForm) -> Tensor:
    """query, key, value [B, h, N, d] -> [B, h, N, d]; text queries keep softmax over all tokens."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide_query, wide_key, wide_value = (tensor.to(dtype) for tensor in (query, key, value))
    linear = image_mass(wide_query, wide_key, wide_value, grid, form)
    image_value, _ = grid.parted(wide_value)
    if form.projection is not None:
        assert form.window is not None
        sparse = local_attention(wide_query, wide_key, wide_value, grid, form.window, scale)
        image = grid.parted(sparse)[0] + linear.mean() @ form.projection
    elif form.gain is not None:
        exact = softmax_mass(wide_query, wide_key, wide_value, grid, form.window, scale)
        gain = form.gain.exp()[:, None, None]
        image = Mass(exact.values + gain * linear.values, exact.total + gain * linear.total).mean()
    else:
        image = linear.mean()
    if form.locality is not None:
        image = image + _convolved(image_value, form.locality, grid)
    image = image.to(query.dtype)
    if not grid.text:
        return image
    _, text_query = grid.parted(query)
    return grid.joined(image, F.scaled_dot_product_attention(text_query, key, value, scale=scale))


def image_mass(query: Tensor, key: Tensor, value: Tensor, grid: Grid, form: LinearForm) -> Mass:
    """The linear part: image queries over image keys."""
    (image_query, _), (image_key, _), (image_value, _) = (grid.parted(tensor) for tensor in (query, key, value))
    batch, heads, tokens, width = image_key.shape
    some_tokens = portions(image_key, tokens, 2 * batch * heads * width)
    sums: list[Tensor] = []
    total: list[Tensor] = []
    for some in some_tokens:
        weights = features(image_key[:, :, some], form.key_map, form.kind)
        sums.append(weights.transpose(-1, -2) @ image_value[:, :, some])
        total.append(weights.sum(-2)[..., None])
    of_values, of_weights = reduce(torch.add, sums), reduce(torch.add, total)
    values: list[Tensor] = []
    totals: list[Tensor] = []
    for some in some_tokens:
        weights = features(image_query[:, :, some], form.query_map, form.kind)
        values.append(weights @ of_values)
        totals.append(weights @ of_weights)
    return Mass(joined(values, 2), joined(totals, 2))


def _convolved(values: Tensor, kernels: Tensor, grid: Grid) -> Tensor:
    """Values [B, h, HW, d] as pictures of h d channels, each with its own kernel."""
    batch, heads, tokens, width = values.shape
    if grid.order is not None:
        values = values[:, :, on(values, grid.order.places(*grid.sides))]
    picture = values.transpose(-1, -2).reshape(batch, heads * width, grid.height, grid.width)
    found = F.conv2d(picture, kernels, padding=1, groups=heads * width)
    found = found.reshape(batch, heads, width, tokens).transpose(-1, -2)
    return found if grid.order is None else found[:, :, on(values, grid.order.listed(*grid.sides))]
