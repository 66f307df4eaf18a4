"""token_order leaves what a model computes as it was, whatever its attentions are and whatever passes come behind it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from ditq.errors import DitqError
from ditq.nn import describe, rebuild
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.ordered_tokens import order_as, ordered_tokens
from ditq.nn.structural.scheduled_block import ScheduledBlock
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention, token_attentions
from ditq.numerics.token_order import KINDS, Kind
from ditq.numerics.window import Window
from ditq.passes import Context
from ditq.passes.block_groups import grouped
from ditq.passes.local_attention import LocalAttentionPass
from ditq.passes.token_order import TokenOrderPass
from ditq.recipe import Recipe
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model
from tests.nn.test_token_attention import mixed, sized
from tests.passes.test_local_attention import run

ORDERED = (*FAMILIES, "wan", "chroma")
CLOSE = 1e-5  # sums of float32 over the same keys in another order
PARTS: list[tuple[type[TokenAttention], dict[str, Any]]] = [
    (LocalAttention, {"window": Window("tiles", 3, 2), "pool": 2}),
    (LinearAttention, {"features": "relu", "window": Window("circle", 3, 2), "locality": True}),
    (CompressedKeys, {"factor": 2}),
    (SparseAttention, {"tile": 2, "keep": 3, "means": True}),
]


def pictures(family: str, order: str) -> list[dict[str, Any]]:
    """Inputs of several sizes, where the order is for any."""
    model = small_model(family)
    other = (5, 5) if family == "dit" else (3, 5)
    several = order == "windows" and family != "chroma"  # which masks tokens, by their number
    return [small_inputs(model, seed=3), *([sized(model, *other)] if several else [])]


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("order", KINDS)
@pytest.mark.parametrize("family", ORDERED)
def test_the_model_computes_what_it_did(family: str, order: Kind) -> None:
    graph, plain = small_graph(family), small_model(family)
    before = [(name, group.feed is not None) for name, group in graph.groups.items()]
    report = TokenOrderPass(order=order, tile=2).run(graph, Context())
    assert report.summary["order"].startswith("windows of 2" if order == "windows" else "a Hilbert")
    assert [(name, group.feed is not None) for name, group in graph.groups.items()] == before
    for inputs in pictures(family, order):
        assert far(forward(graph.model, inputs), forward(plain, inputs)) < CLOSE


@pytest.mark.parametrize("order", KINDS)
@pytest.mark.parametrize("parts", [PARTS[:2], PARTS[2:]], ids=["windows", "tiles"])
@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_parts_compute_what_they_did(family: str, parts: list[Any], order: Kind) -> None:
    if family == "wan":  # which have no form for videos
        parts = [(kind, settings) for kind, settings in parts if kind in (LocalAttention, CompressedKeys)]
    model = mixed(small_graph(family), parts)
    plain, graph = copy.deepcopy(model), small_graph(family)
    graph.model = model
    TokenOrderPass(order=order, tile=2).run(graph, Context())
    assert all(part.layout.order is not None for part in token_attentions(model).values())
    for inputs in pictures(family, order):
        assert far(forward(model, inputs), forward(plain, inputs)) < CLOSE


def test_tokens_do_lie_in_that_order_between_the_blocks() -> None:
    """In the model and in the original, whose blocks the model's are compared with."""
    graph, plain, context = small_graph("sd3"), small_model("sd3"), Context()
    context.original = copy.deepcopy(plain)
    TokenOrderPass(tile=2).run(graph, context)
    seen: list[torch.Tensor] = []
    for model in (plain, graph.model, context.original):
        block = model.get_submodule("transformer_blocks.1")
        block.register_forward_hook(lambda module, given, output: seen.append(output[1]))
        forward(model, small_inputs(plain, seed=3))
    order = ordered_tokens(graph.model)
    assert order is not None and order.layout.order is not None
    listed = torch.from_numpy(order.layout.order.listed(1, 8, 8))
    assert far(seen[1], seen[0][:, listed]) < CLOSE < 0.1 < far(seen[1], seen[0])
    order_as(plain, graph.model)
    forward(plain, small_inputs(plain, seed=3))
    assert far(seen[2], seen[1]) < CLOSE and far(seen[3], seen[1]) < CLOSE


@pytest.mark.parametrize("family", ["flux", "pixart", "wan"])
def test_a_rebuilt_model_and_a_copy_give_the_same(family: str) -> None:
    graph = small_graph(family)
    TokenOrderPass(tile=2).run(graph, Context())
    model, inputs = graph.model, pictures(family, "windows")
    expected = [forward(model, given) for given in inputs]
    for name in ordered_tokens(model).spec()["entry"], ordered_tokens(model).spec()["exit"]:  # type: ignore[union-attr]
        model.set_submodule(name, copy.deepcopy(model.get_submodule(name)))  # as passes do that come later
    again = small_model(family)
    rebuild(again, json.loads(json.dumps(describe(model))), model.state_dict())
    for other in (model, copy.deepcopy(model), again):
        for given, wanted in zip(inputs, expected, strict=True):
            assert torch.equal(forward(other, given), wanted)


@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_blocks_that_passes_put_around_the_first_one_leave_the_order_as_it_is(family: str) -> None:
    models = []
    for ordered in (False, True):
        for runs in (True, False):
            graph = small_graph(family)
            if ordered:
                TokenOrderPass(tile=2).run(graph, Context())
                forward(graph.model, small_inputs(graph.model))  # so that the block that was first is watched too
            found = grouped(graph, ["transformer_blocks"], 1, 1, "test")[0]
            assert found.blocks[0] == "transformer_blocks.0"
            carried = found.carried
            spec = {
                "runs": [runs], "edges": [], "arguments": list(carried.arguments), "carried": list(carried.names),
                "widths": list(carried.widths), "bare": carried.bare, "compared": False,
            }  # fmt: skip
            ScheduledBlock.install(graph.model, found.blocks[0], spec)
            models.append(graph.model)
    plain, ordered_models, inputs = models[:2], models[2:], small_inputs(models[0], seed=3)
    for found_model, meant in zip(ordered_models, plain, strict=True):
        assert far(forward(found_model, inputs), forward(meant, inputs)) < CLOSE
    assert far(forward(plain[0], inputs), forward(plain[1], inputs)) > 1e-3


def test_modules_that_are_called_alone_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after a call of the model, nor after one that failed on its way."""
    graph, plain = small_graph("sd3"), small_model("sd3")
    TokenOrderPass(tile=2).run(graph, Context())
    inputs, tokens = small_inputs(plain, seed=3), torch.randn(2, 64, 64)
    for failing in (False, True):
        with monkeypatch.context() as patched:
            if failing:
                patched.setattr(graph.model.get_submodule("norm_out"), "forward", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    forward(graph.model, inputs)
            else:
                forward(graph.model, inputs)
        assert torch.equal(graph.model.get_submodule("proj_out")(tokens), plain.get_submodule("proj_out")(tokens))
    assert far(forward(graph.model, inputs), forward(plain, inputs)) < CLOSE


def test_conversions_behind_it_are_measured_and_learned_in_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for ordered in (False, True):
        graph = small_graph("flux")
        if ordered:
            TokenOrderPass(tile=2).run(graph, Context())
        report = run(LocalAttentionPass(tile=2, window=3), graph, monkeypatch)
        errors.append([row["output error"] for row in report.rows])
        assert all((part.layout.order is not None) == ordered for part in token_attentions(graph.model).values())
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


def test_what_does_not_fit_is_one_line() -> None:
    for tile in (0, 10**23):
        with pytest.raises(DitqError, match=rf"tile is {tile}, must be 1 to 65536"):
            TokenOrderPass(tile=tile).check()
    for family, what in (("sana", "is not known; give its family a layout"), ("flux2", "give its family a layout")):
        with pytest.raises(DitqError, match=what) as caught:
            TokenOrderPass().preview(small_graph(family))
        assert "\n" not in str(caught.value)
    graph = small_graph("pixart")
    TokenOrderPass().run(graph, Context())
    with pytest.raises(DitqError, match="in an order already"):
        TokenOrderPass().preview(graph)
    block = small_graph("pixart")
    block.model.get_submodule("transformer_blocks.0").add_module("mixing", torch.nn.Conv2d(1, 1, 3))
    with pytest.raises(DitqError, match=r"transformer_blocks.0 .* has a convolution"):
        TokenOrderPass().preview(block)


def test_a_recipe_may_hold_it_and_leaves_the_graph_as_it_was() -> None:
    graph = small_graph("flux")
    steps = [
        {"token_order": {"tile": 2}},
        {"local_attention": {"tile": 2, "window": 3}},
        {"quantize": {"format": "w4a8"}},
    ]
    plan = Recipe.from_dict({"name": "ordered", "passes": steps}, "test").preview(graph)
    assert any("local attention" in what for found in plan.values() for what in found)
    assert ordered_tokens(graph.model) is None


def test_a_curve_is_for_pictures_of_the_size_that_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    monkeypatch.setattr(TokenOrderPass, "_drawn", lambda *_: {(4, 4)})
    with pytest.raises(DitqError, match="of 4 x 4 tokens were recorded, and a Hilbert curve is for those of 8 x 8"):
        TokenOrderPass(order="hilbert").run(graph, Context())
    TokenOrderPass(order="windows", tile=4).run(graph, Context())
