"""Exact folds: move a scale, a shift or a rotation of a group's input into what comes before it and into its weights.

Identities (adaLN block x = norm(z) (1 + gamma) + beta, consumers y = x W^T + b), with x' = (x / s) - c:
    1 + gamma' = (1 + gamma) / s        beta' = beta / s - c        W' = W diag(s)        b' = b + W diag(s) c
Attention mixes tokens only, so a matrix R a head passes through it:  W_v' = R^T W_v,  b_v' = R^T b_v,  W_o' = W_o R. So does a
scale a channel, and, since its weights sum to 1, a shift:  W_v' = diag(1 / s) W_v,  b_v' = b_v / s - c.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.modulation_factor import attach
from ditq.nn.transformed_linear import TransformedLinear
from ditq.numerics.rotation import Rotation
from ditq.parts import Attention, Feed, LinearModulation, NormModulation, TableModulation


def plain_linear(graph: DiTGraph, site: str) -> nn.Linear:
    """The nn.Linear at a site, seen through a transform that stands before it.

    Raises:
        DitqError: an earlier pass has quantized it, so nothing can be folded into it any more.
    """
    module = graph.linear(site)
    linear = module.linear if isinstance(module, TransformedLinear) else module
    if not isinstance(linear, nn.Linear):
        raise DitqError(f"{site}: is quantized already; put the pass 'quantize' after those that change weights")
    return linear


def can_shift(feed: Feed) -> bool:
    """Can a constant be subtracted from what this feed makes?"""
    return not isinstance(feed, NormModulation) or feed.bias is not None


def fold_into_feed(graph: DiTGraph, feed: Feed, inverse_scale: Tensor, shift: Tensor) -> None:
    """Make the feed give x * inverse_scale - shift where it gave x. Both [width], float64 inside."""
    inverse, moved = inverse_scale.double(), shift.double()
    if isinstance(feed, LinearModulation):
        linear, width = plain_linear(graph, feed.site), len(inverse)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        scales, shifts = slice(feed.scale, feed.scale + width), slice(feed.shift, feed.shift + width)
        for piece, constant in ((scales, inverse - 1), (shifts, -moved)):
            _set(linear.weight[piece], linear.weight[piece].double() * inverse[:, None])
            _set(linear.bias[piece], linear.bias[piece].double() * inverse + constant)
    elif isinstance(feed, TableModulation):
        table = graph.model.get_parameter(feed.table)
        rows = table.view(-1, table.shape[-1])
        _set(rows[feed.scale], rows[feed.scale].double() * inverse + inverse - 1)
        _set(rows[feed.shift], rows[feed.shift].double() * inverse - moved)
        factor = attach(graph.model.get_submodule(feed.block), rows.shape[0], rows.shape[1], feed.argument).factor
        for row in (feed.scale, feed.shift):
            _set(factor[row], factor[row].double() * inverse)
    else:
        weight = graph.model.get_parameter(feed.weight)
        _set(weight, weight.double() * inverse)
        if feed.bias is not None:
            bias = graph.model.get_parameter(feed.bias)
            _set(bias, bias.double() * inverse - moved)


def fold_into_consumers(graph: DiTGraph, sites: tuple[str, ...], inverse_scale: Tensor, shift: Tensor) -> None:
    """W' = W / inverse_scale and b' = b + W' shift, so that consumers of x * inverse_scale - shift compute the same."""
    for site in sites:
        linear = plain_linear(graph, site)
        weight = linear.weight.double() / inverse_scale.double()
        moved = weight @ shift.double()
        if bool(moved.abs().max() > 0):
            if linear.bias is None:
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
            _set(linear.bias, linear.bias.double() + moved)
        _set(linear.weight, weight)


def fold_into_values(graph: DiTGraph, attention: Attention, inverse_scale: Tensor, shift: Tensor) -> None:
    """Make the attention give o * inverse_scale - shift where it gave o. Both [heads * head_width]."""
    inverse = inverse_scale.double()
    for site in attention.values:
        linear = plain_linear(graph, site)
        _set(linear.weight, linear.weight.double() * inverse[:, None])
        bias = inverse.new_zeros(len(inverse)) if linear.bias is None else linear.bias.double() * inverse
        moved = bias - shift.double()
        if linear.bias is None and bool(moved.any()):
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        if linear.bias is not None:
            _set(linear.bias, moved)


def fold_through_attention(graph: DiTGraph, attention: Attention, matrices: Tensor) -> None:
    """Rotate every head's values and undo it in the output linears. matrices: [d, d] for all heads, or [heads, d, d]."""
    width = attention.head_width
    for site in attention.values:
        linear = plain_linear(graph, site)
        heads = linear.weight.double().view(-1, width, linear.in_features)
        _set(linear.weight, (matrices.mT @ heads).reshape(linear.weight.shape))
        if linear.bias is not None:
            _set(linear.bias, (linear.bias.double().view(-1, 1, width) @ matrices).reshape(-1))
    for output in attention.outputs:
        linear = plain_linear(graph, output.site)
        columns = linear.weight[:, output.start : output.stop]
        heads = columns.double().reshape(linear.out_features, -1, 1, width)
        _set(columns, (heads @ matrices).reshape(columns.shape))


def rotate_consumers(graph: DiTGraph, sites: tuple[str, ...], start: int, stop: int, rotation: Rotation) -> None:
    """W[:, start:stop] <- W[:, start:stop] R for consumers of a rotated input."""
    for site in sites:
        columns = plain_linear(graph, site).weight[:, start:stop]
        _set(columns, rotation.right_multiply(columns.double()))


def _set(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value.to(target.dtype))
