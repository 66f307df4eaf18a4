"""Linear attention as matrix products in the order that makes sums over keys once, and softmax weights without their sum."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.token_attentions import lowers
from ditq.export.lowering.token_attentions.local_attention import window_scores
from ditq.export.lowering.token_attentions.tokens import Tokens
from ditq.numerics.linear_attention import SMALLEST
from ditq.numerics.window import Window

Masses = tuple[ir.Value, ir.Value]  # values summed with weights [B, h, N, d], and the sum of the weights [B, h, N, 1]


@lowers("linear_attention")
def linear_attention(tokens: Tokens) -> ir.Value:
    """As `numerics.linear_attention.linear_attention`."""
    writer, settings = tokens.writer, tokens.settings
    query_map, key_map, *others = tokens.tensors
    (image_query, _), (image_key, text_key) = tokens.parted(tokens.query), tokens.parted(tokens.key)
    image_value, text_value = tokens.parted(tokens.value)
    scaled_image, scaled_text = tokens.parted(tokens.scaled(tokens.query))
    common = [] if text_key is None or text_value is None else [(text_key, text_value)]
    window = None if settings["window"] is None else Window(**settings["window"])

    linear = _linear(tokens, image_query, image_key, image_value, query_map, key_map)
    if settings["added"]:
        assert window is not None
        scores = window_scores(tokens, scaled_image, image_key, image_value, common, window)
        more = writer.op("MatMul", _mean(tokens, linear), others.pop(0), name="projected")
        image = writer.op("Add", scores.placed(scores.attended()), more, name="added")
    elif window is not None or common:
        gain = writer.op("Exp", others.pop(0), name="gain")
        gain = writer.op("Reshape", gain, tokens.sizes.shape(tokens.heads, 1, 1), name="gain")
        if window is None:
            exact = _exact(tokens, scaled_image, *common[0])
        else:
            exact = _exact_in_window(tokens, scaled_image, image_key, image_value, common, window)
        both = [
            writer.op("Add", softmax, writer.op("Mul", other, gain, name="gained"), name="joined")
            for softmax, other in zip(exact, linear, strict=True)
        ]
        image = _mean(tokens, (both[0], both[1]))
    else:
        image = _mean(tokens, linear)
    if settings["locality"]:
        image = writer.op("Add", image, _convolved(tokens, image_value, others.pop(0)), name="local")
    text = None if scaled_text is None else tokens.attended(scaled_text, tokens.key, tokens.value)
    return tokens.joined(image, text)


def _features(tokens: Tokens, x: ir.Value, weight: ir.Value) -> ir.Value:
    writer, kind = tokens.writer, tokens.settings["features"]
    y = writer.op("MatMul", x, weight, name="mapped")
    if kind == "relu":
        return writer.op("Relu", y, name="features")
    if kind == "elu":
        return writer.op("Add", writer.op("Elu", y, name="elu"), _number(tokens, 1), name="features")
    halves = [writer.op("Softmax", side, name="half", axis=-1) for side in (y, writer.op("Neg", y, name="negative"))]
    return writer.op("Concat", *halves, name="features", axis=-1)


def _linear(
    tokens: Tokens, query: ir.Value, key: ir.Value, value: ir.Value, query_map: ir.Value, key_map: ir.Value
) -> Masses:
    """Of all image keys."""
    writer = tokens.writer
    of_query, of_key = _features(tokens, query, query_map), _features(tokens, key, key_map)
    sums = writer.op("MatMul", tokens.turned(of_key), value, name="sums")
    # A product, which reads memory in its order; ONNX Runtime's own sum over rows takes as long as the product with values.
    one = ir.tensor(np.ones(1, np.float32))
    ones = writer.op("ConstantOfShape", tokens.sizes.shape(1, tokens.image), name="ones", value=one)
    total = writer.op("MatMul", ones, of_key, name="total")
    return (
        writer.op("MatMul", of_query, sums, name="linear"),
        writer.op("MatMul", of_query, tokens.turned(total), name="linear_total"),
    )


def _exact(tokens: Tokens, query: ir.Value, key: ir.Value, value: ir.Value) -> Masses:
    """Of text keys."""
    scores = tokens.writer.op("MatMul", query, tokens.turned(key), name="scores")
    weights = _exponentials(tokens, scores)
    return tokens.writer.op("MatMul", weights, value, name="exact"), _sum(tokens, weights)


def _exact_in_window(
    tokens: Tokens,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    common: list[tuple[ir.Value, ir.Value]],
    window: Window,
) -> Masses:
    """Of text keys and the image keys of a window."""
    scores = window_scores(tokens, query, key, value, common, window)
    weights = _exponentials(tokens, scores.scores)
    return scores.placed(scores.weighed(weights)), scores.placed(_sum(tokens, weights))


def _exponentials(tokens: Tokens, scores: ir.Value) -> ir.Value:
    writer = tokens.writer
    last = writer.constant([-1], np.int64, name="axis")
    largest = writer.op("ReduceMax", scores, last, name="largest", keepdims=1)
    return writer.op("Exp", writer.op("Sub", scores, largest, name="below"), name="weights")


def _sum(tokens: Tokens, weights: ir.Value) -> ir.Value:
    last = tokens.writer.constant([-1], np.int64, name="axis")
    return tokens.writer.op("ReduceSum", weights, last, name="sum", keepdims=1)


def _mean(tokens: Tokens, masses: Masses) -> ir.Value:
    values, total = masses
    total = tokens.writer.op("Add", total, _number(tokens, SMALLEST), name="not_zero")
    return tokens.writer.op("Div", values, total, name="mean")


def _number(tokens: Tokens, number: float) -> ir.Value:
    return tokens.writer.constant(np.float32(number), name="number")


def _convolved(tokens: Tokens, values: ir.Value, kernels: ir.Value) -> ir.Value:
    """Values [B, h, HW, d] as pictures of h d channels, each with its own kernel."""
    writer, sizes, channels = tokens.writer, tokens.sizes, tokens.heads * tokens.width
    if tokens.order is not None:
        values = tokens.taken(values, tokens.places())
    shape = sizes.shape(0, channels, tokens.height, tokens.width_of_picture)
    picture = writer.op("Reshape", tokens.turned(values), shape, name="picture")
    found = writer.op("Conv", picture, kernels, name="convolved", group=channels, pads=[1, 1, 1, 1])
    apart = writer.op("Reshape", found, sizes.shape(0, tokens.heads, tokens.width, -1), name="heads_parted")
    found = tokens.turned(apart)
    return found if tokens.order is None else tokens.taken(found, tokens.listed())
