"""linear_attention fits its parts to what attention gave, and says through the graph what may pass through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditq.errors import DitqError
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.token_attention import token_attentions
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.passes import Context
from ditq.passes.attention_records import part_error, records_of
from ditq.passes.linear_attention import LinearAttentionPass
from ditq.passes.local_attention import LocalAttentionPass
from ditq.passes.rotate import Rotate
from ditq.passes.smooth import Smooth
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of
from tests.passes.test_local_attention import batches_of, recipe, run


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_and_rotation_pass_through_linear_attention_exactly(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_graph(family)
    run(LinearAttentionPass(features="elu", fit=0), graph, monkeypatch)
    assert all(found.foldable for found in graph.attentions.values() if found.to_each_other)
    statistics = statistics_of(graph)
    graph.model.double()
    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in small_inputs(graph.model, seed=7).items()
    }
    reference = forward(graph.model, inputs)
    context = Context(statistics)
    Smooth(centre=True).run(graph, context)
    Rotate(mode="hadamard", online=False).run(graph, context)
    found = forward(graph.model, inputs)
    # As in test_folds.py; a shift leaves what SMALLEST is of the sum of weights, of order 1 or more.
    assert float((found - reference).norm() / reference.norm()) < (1e-6 if family == "pixart" else 1e-10)


@pytest.mark.parametrize("settings", [{"locality": True}, {"form": "added", "window": 1, "tile": 2}], ids=str)
def test_nothing_is_folded_through_a_part_that_treats_channels_differently(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_graph("dit")
    run(LinearAttentionPass(fit=0, **settings), graph, monkeypatch)
    assert len(graph.attentions) == 2 and not any(found.foldable for found in graph.attentions.values())


def test_the_fit_brings_the_part_nearer_to_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("flux")
    report = run(LinearAttentionPass(fit=40, locality=True, layers=["transformer_blocks.0.attn"]), graph, monkeypatch)
    assert report.rows[0]["output error"] < 0.9 * report.rows[0]["error before the fit"]
    part = token_attentions(graph.model)["transformer_blocks.0.attn"]
    assert not any(parameter.requires_grad for parameter in part.parameters())


def test_the_gain_gives_the_picture_the_weight_that_softmax_gave_it() -> None:
    graph = small_graph("flux")
    layout, name = graph.layout, "single_transformer_blocks.0.attn"
    assert layout is not None
    records = records_of(graph.model, name, batches_of(graph), layout, True)
    part = LinearAttention(name, layout, 2, 32, True, 0, "elu")
    assert part.gain is not None
    r = records[0]
    errors = {}
    start = part.start_gain(r.query, r.key, r.value, r.grid, r.scale)
    for shift in (-3.0, 0.0, 3.0):
        part.gain.copy_(start + shift)
        errors[shift] = part_error(part, [r])
    assert errors[0.0] < errors[-3.0] and errors[0.0] < errors[3.0]


def test_the_gain_is_finite_however_large_the_scores_are() -> None:
    """Also where keys that are not near have scores far above those that are, and far below."""
    part = LinearAttention("site", TokenLayout(), 2, 16, True, 0, "softmax")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3 + 64, 16, generator=generator) for _ in range(3))
    for image, text in ((60.0, 1.0), (1.0, 60.0)):
        sized = torch.cat([text * key[:, :, :3], image * key[:, :, 3:]], 2)
        gain = part.start_gain(30 * query, sized, value, Grid(3, 8, 8), 0.25)
        assert gain.isfinite().all()


def test_the_added_form_starts_as_the_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = small_graph("sd3"), small_graph("sd3")
    run(LinearAttentionPass(form="added", window=1, tile=2, fit=0), one, monkeypatch)
    run(LocalAttentionPass(window=1, tile=2), two, monkeypatch)
    inputs = small_inputs(one.model)
    assert torch.equal(forward(one.model, inputs), forward(two.model, inputs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "added"}, "form added adds to a window; set window"),
        ({"features": "exp"}, "features"),
        ({"tile": 0}, "tile"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitqError) as caught:
        recipe({"linear_attention": settings})
    assert message in str(caught.value) and "linear_attention" in str(caught.value) and "\n" not in str(caught.value)
