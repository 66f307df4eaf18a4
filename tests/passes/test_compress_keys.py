"""compress_keys fits its squares to what attention gave, costs what it says, and lets smoothing and rotation pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ditq.errors import DitqError
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.token_attention import token_attentions
from ditq.passes import Context, attention_conversion
from ditq.passes.compress_keys import CompressKeys
from ditq.passes.rotate import Rotate
from ditq.passes.smooth import Smooth
from ditq.site_cache import FolderSiteCache
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of
from tests.passes.test_local_attention import Recorded, batches_of, recipe, run


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_and_rotation_pass_through_squares_exactly(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph(family)
    run(CompressKeys(factor=3, fit=3), graph, monkeypatch)
    assert all(found.foldable for found in graph.attentions.values() if found.to_each_other)
    statistics = statistics_of(graph)
    graph.model.double()
    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in small_inputs(graph.model, seed=7).items()
    }
    reference = forward(graph.model, inputs)
    weights = copy.deepcopy(graph.model.state_dict())
    Smooth(centre=True).run(graph, Context(statistics))
    Rotate(mode="hadamard", online=False).run(graph, Context(statistics))
    found = forward(graph.model, inputs)
    # As in test_folds.py: PixArt keeps a factor in float32.
    assert float((found - reference).norm() / reference.norm()) < (1e-6 if family == "pixart" else 1e-12)
    values = {site for attention in graph.attentions.values() if attention.foldable for site in attention.values}
    assert values
    for site in values:
        assert not torch.allclose(graph.model.state_dict()[f"{site}.weight"], weights[f"{site}.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_known_before_and_fall_by_the_square_of_the_factor(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, step = small_graph(family), CompressKeys(factor=2, fit=0)
    before = {name: found.macs for name, found in graph.attentions.items()}
    known = {name: work.macs for name, work in step.costs(graph).items()}
    report = run(step, graph, monkeypatch)
    found = {name: found.macs for name, found in graph.attentions.items() if found.to_each_other}
    assert known == found and report.summary["attentions"] == len(found)
    for name, macs in found.items():
        attention = graph.attentions[name]
        part = token_attentions(graph.model)[attention.module]
        assert isinstance(part, CompressedKeys) and part.layout is not None
        grid = part.layout.grid(graph.example_inputs)
        grid = grid if part.text else grid.without_text()
        tokens, keys = grid.text + grid.image, grid.text + grid.image // 4  # its sides are even
        # Of tokens^2 pairs of a query and a key; the sums are one product for each image token.
        assert macs * tokens**2 == before[name] * (tokens * keys + grid.image)


def test_the_fit_brings_the_part_nearer_to_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, site = small_graph("flux"), "transformer_blocks.0.attn"
    report = run(CompressKeys(fit=40, layers=[site]), graph, monkeypatch)
    assert report.rows[0]["output error"] < report.rows[0]["error before the fit"]
    part = token_attentions(graph.model)[site]
    assert not any(parameter.requires_grad for parameter in part.parameters())
    assert all(bool((parameter != parameter.flatten()[0]).any()) for parameter in part.parameters())


def test_a_fit_that_was_finished_is_not_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []
    for steps in (5, 7):  # the second run is given another number, to tell a fit of its own by
        graph = small_graph("flux")
        context = Recorded(None, 0, FolderSiteCache(tmp_path, {}))
        batches = batches_of(graph)
        monkeypatch.setattr(attention_conversion, "sampled_batches", lambda *_, batches=batches: batches)
        CompressKeys(fit=steps).run(graph, context)
        found.append([part.state_dict() for part in token_attentions(graph.model).values()])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 1}, "factor must be at least 2"),
        ({"fit": -1}, "fit must not be negative"),
        ({"fraction": 2}, "fraction is 2"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitqError) as caught:
        recipe({"compress_keys": settings})
    assert message in str(caught.value) and "compress_keys" in str(caught.value) and "\n" not in str(caught.value)


def test_an_attention_is_converted_once() -> None:
    with pytest.raises(DitqError, match="'local_attention' cannot follow 'compress_keys'"):
        recipe("compress_keys", "local_attention").preview(small_graph("flux"))
    with pytest.raises(DitqError, match="'quantize_attention' cannot follow 'compress_keys'"):
        recipe("compress_keys", "quantize_attention").preview(small_graph("flux"))
