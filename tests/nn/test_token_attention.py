"""Parts that know where the picture lies among the tokens: told at each call, copied and rebuilt with their model."""

from __future__ import annotations

import copy
import json
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import nn

from ditq.errors import DitqError
from ditq.families import family_of
from ditq.graph import DiTGraph
from ditq.kernels.on_gpu import check
from ditq.nn import describe, rebuild
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention, attach, token_attentions
from ditq.numerics.window import Window
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model


def converted(
    graph: DiTGraph, kind: type[TokenAttention] = LocalAttention, usual: int = 0, **settings: Any
) -> nn.Module:
    """The graph's model with such a part in each attention of the picture's tokens with each other."""
    return mixed(graph, [(kind, settings)], usual)


def mixed(graph: DiTGraph, parts: list[tuple[type[TokenAttention], dict[str, Any]]], usual: int = 0) -> nn.Module:
    """The graph's model with these parts in its attentions of the picture's tokens, one after the other and then again."""
    family = family_of(type(graph.model).__name__)
    assert family is not None
    layout = family.layout(graph.model.config)  # type: ignore[arg-type]
    assert layout is not None
    image = layout.grid(graph.example_inputs).image
    places = [found for found in graph.attentions.values() if found.to_each_other]
    for found, (kind, settings) in zip(places, cycle(parts), strict=False):
        common = (found.module, layout, found.heads, found.head_width, found.tokens != image, usual)
        attach(graph.model, kind(*common, **settings))
    return graph.model


def sized(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    """Inputs of a picture of height x width tokens, or of a video of 5 such frames."""
    inputs = small_inputs(model)
    if inputs["hidden_states"].dim() == 5:
        return {**inputs, "hidden_states": torch.randn(2, inputs["hidden_states"].shape[1], 5, 2 * height, 2 * width)}
    if "img_ids" in inputs:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros(height, width), rows, columns], -1).view(-1, 3)
        tokens = torch.randn(2, height * width, inputs["hidden_states"].shape[-1])
        return {**inputs, "img_ids": places, "hidden_states": tokens}
    return {**inputs, "hidden_states": torch.randn(2, inputs["hidden_states"].shape[1], 2 * height, 2 * width)}


WITH_VIDEO = (*FAMILIES, "wan")


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_window_over_all_of_the_picture_changes_nothing(family: str) -> None:
    graph = small_graph(family)
    sides = (5, 5) if family == "dit" else (3, 5)  # which takes square pictures only
    for inputs in (small_inputs(graph.model, seed=3), sized(graph.model, *sides)):
        plain = forward(small_model(family), inputs)
        model = converted(small_graph(family), window=Window("circle", 12, 4))
        # Both are softmax in float32 over the same keys, in another order: rounding through a dozen products.
        assert float((forward(model, inputs) - plain).norm() / plain.norm()) < 1e-5


PARTS: list[tuple[type[TokenAttention], dict[str, Any]]] = [
    (LocalAttention, {"window": [None, Window("tiles", 1, 2, 1, 2)], "pool": 2}),
    (CompressedKeys, {"factor": 2}),
    (SparseAttention, {"tile": 2, "keep": 1, "means": True}),
]


def name_of(given: object) -> str:
    return str(getattr(given, "kind", ""))


@pytest.mark.parametrize(("kind", "settings"), PARTS, ids=name_of)
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_rebuilt_model_and_a_copy_give_the_same_bits(
    family: str, kind: type[TokenAttention], settings: dict[str, Any]
) -> None:
    model = converted(small_graph(family), kind, **settings)
    for part in token_attentions(model).values():
        for parameter in part.parameters():
            parameter.uniform_(0.1, 1)
    inputs = small_inputs(model, seed=4)
    expected = forward(model, inputs)
    fresh = small_model(family, seed=1)
    rebuild(fresh, json.loads(json.dumps(describe(model))), model.state_dict())
    copied = copy.deepcopy(model)
    assert torch.equal(forward(fresh, inputs), expected) and torch.equal(forward(copied, inputs), expected)
    assert describe(fresh) == describe(model) == describe(copied)
    for part in token_attentions(copied).values():
        part.usual = 2  # so that scores are sharpened
    assert not torch.equal(forward(copied, inputs), expected) and torch.equal(forward(model, inputs), expected)


def test_a_rebuilt_model_sees_the_tiles_that_were_found_before() -> None:
    model = converted(small_graph("flux"), SparseAttention, tile=2, keep=3, means=True, picture=(8, 8))
    for part in token_attentions(model).values():
        assert isinstance(part, SparseAttention) and part.seen is not None
        part.seen.copy_(torch.rand(part.heads, 16, 16).argsort(-1)[..., :3])
    inputs, fresh = small_inputs(model, seed=4), small_model("flux", seed=1)
    rebuild(fresh, json.loads(json.dumps(describe(model))), model.state_dict())
    assert torch.equal(forward(fresh, inputs), forward(model, inputs))


@pytest.mark.parametrize(("kind", "settings"), PARTS, ids=name_of)
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_the_graph_still_sees_attention_and_what_it_costs_now(
    family: str, kind: type[TokenAttention], settings: dict[str, Any]
) -> None:
    graph = small_graph(family)
    before = dict(graph.attentions)
    converted(graph, kind, **settings)
    graph.refresh()
    assert graph.attentions.keys() == before.keys()
    for name, found in graph.attentions.items():
        was = before[name]
        assert (found.queries, found.keys, found.values, found.outputs) == (
            was.queries,
            was.keys,
            was.values,
            was.outputs,
        )
        assert found.foldable == was.foldable
        assert found.macs < was.macs if was.to_each_other else found.macs == was.macs


def test_tokens_that_are_no_picture_are_refused() -> None:
    model = converted(small_graph("flux"), window=Window("tiles", 1, 2))
    inputs = small_inputs(model)
    inputs["img_ids"] = inputs["img_ids"] * 2
    with pytest.raises(ValueError, match="80 tokens are not 16 of text and 15 x 15 of a picture"):
        forward(model, inputs)
    part = next(iter(token_attentions(model).values()))
    part.grid = None
    with pytest.raises(ValueError, match="the whole model must be called"):
        part(*[torch.zeros(1, 2, 4, 32)] * 3, None, None)


class WithoutKernel(LocalAttention):
    """A part that no target has a kernel for."""


def test_a_target_without_a_kernel_says_so() -> None:
    with pytest.raises(DitqError, match="no kernel for local attention; leave the pass local_attention out"):
        check(converted(small_graph("dit"), WithoutKernel, window=Window("tiles", 1, 2)))
