"""Pairs of blocks of which the second reads what the first reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditq.calibration.calibrate import calibrate
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.export import load_engine, model_agreement, site_agreement
from ditq.export.fusion import prove_fusion
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.kernels.traced import compiled
from ditq.nn import describe, rebuild
from ditq.nn.structural.parallel_block import pair, paired
from ditq.pass_pipeline import run_passes
from ditq.passes.gate import ERROR
from ditq.passes.parallel_blocks import Pair, ParallelBlocks
from ditq.recipe import Recipe
from tests.export.quantized import engine_of, means_torch, quantize_blocks, relative
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model, statistics_of
from tests.small_checkpoint import write_pipeline

PROMPTS = ["red apple", "blue fish", "green leaf", "a star"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_pipeline(tmp_path_factory.mktemp("pairs") / "pipeline", layers=3))


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return calibrate(
        checkpoint, tmp_path_factory.mktemp("pairs") / "stats", conditions=PROMPTS, steps=4, progress=False
    )


def graph_of(checkpoint: Checkpoint) -> DiTGraph:
    return DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))


def run(graph: DiTGraph, statistics: Statistics, *steps: dict[str, Any]) -> list[Any]:
    return run_passes(graph, Recipe.from_dict({"passes": list(steps)}, "test"), statistics)


def made(family: str) -> tuple[DiTGraph, Pair]:
    """A small model and a pair of its blocks. DiT's first block and SD3's last can be in none, so these have three."""
    graph = small_graph(family)
    if family in ("dit", "sd3"):
        torch.manual_seed(0)
        config: Any = graph.model.config
        model: Any = type(graph.model).from_config({**config, "num_layers": 3})  # type: ignore[attr-defined]
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
        model = model.eval().requires_grad_(False)
        graph = DiTGraph(model, small_inputs(model))
    found = ParallelBlocks().pairs(graph)[-1]
    return graph, found


def by_hand(model: nn.Module, found: Pair) -> nn.Module:
    """The original, in which the second block's forward is written out."""
    first, second = model.get_submodule(found.first), model.get_submodule(found.second)
    runs, read = second.forward, {}

    def keep(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read.update(keywords, **({"hidden_states": positional[0]} if positional else {}))

    def parallel(*positional: Any, **keywords: Any) -> Any:
        given = {**keywords, **({"hidden_states": positional[0]} if positional else {})}
        x, text = read["hidden_states"], read.get("encoder_hidden_states")
        if isinstance(found.carried.names, tuple) and len(found.carried.names) == 1:
            y = runs(x, *positional[1:], **{k: v for k, v in keywords.items() if k != "hidden_states"})
            return given["hidden_states"] + y - x
        y_text, y = runs(**{**given, "hidden_states": x, "encoder_hidden_states": text})
        return given["encoder_hidden_states"] + y_text - text, given["hidden_states"] + y - x

    first.register_forward_pre_hook(keep, with_kwargs=True)
    second.forward = parallel  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_block_reads_what_the_first_reads_and_both_are_added(family: str) -> None:
    graph, found = made(family)
    inputs = small_inputs(graph.model, seed=5)
    plain, expected = forward(graph.model, inputs), forward(by_hand(copy.deepcopy(graph.model), found), inputs)
    undo = pair(graph.model, found.second, found.part())
    assert torch.equal(forward(graph.model, inputs), expected) and not torch.equal(plain, expected)
    undo()
    assert torch.equal(forward(graph.model, inputs), plain) and not paired(graph.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_and_a_rebuilt_model_are_parallel_too_and_by_themselves(family: str) -> None:
    graph, found = made(family)
    fresh, inputs = copy.deepcopy(graph.model), small_inputs(graph.model, seed=5)
    pair(graph.model, found.second, found.part())
    expected = forward(graph.model, inputs)
    state = {name: tensor.clone() for name, tensor in graph.model.state_dict().items()}
    rebuild(fresh, json.loads(json.dumps(describe(graph.model))), state)
    copied = copy.deepcopy(graph.model)
    for parameter in graph.model.get_submodule(found.second).parameters():
        parameter.zero_()
    assert torch.equal(forward(fresh, inputs), expected) and torch.equal(forward(copied, inputs), expected)
    assert not torch.equal(forward(graph.model, inputs), expected)


def test_the_graph_sees_the_same_linears_and_blocks() -> None:
    graph, found = made("flux")
    before = (list(graph.sites), list(graph.blocks), {name: each.macs for name, each in graph.attentions.items()})
    pair(graph.model, found.second, found.part())
    graph.refresh()
    assert (list(graph.sites), list(graph.blocks), {n: each.macs for n, each in graph.attentions.items()}) == before


def test_an_engine_computes_it_in_integers(tmp_path: Path) -> None:
    graph, found = made("pixart")
    pair(graph.model, found.second, found.part())
    engine = engine_of(quantize_blocks(graph.model), tmp_path / "engine")
    inputs = small_inputs(graph.model)
    assert model_agreement(engine, inputs).holds and prove_fusion(engine).complete
    means_torch(engine, inputs)
    assert max(site_agreement(engine, inputs).values()) < 1e-3
    meant = forward(graph.model, inputs)
    assert float((load_engine(engine.folder, "torch")(**inputs).sample - meant).norm() / meant.norm()) < 1e-6


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_scales_shifts_and_rotations_leave_pairs_as_they_are(family: str) -> None:
    graph, found = made(family)
    pair(graph.model, found.second, found.part())
    graph.refresh()
    inputs = small_inputs(graph.model, seed=5)
    before = forward(graph.model, inputs)
    steps = [{"smooth": {"alpha": 0.5, "centre": True}}, {"rotate": {"mode": "hadamard"}}]
    run(graph, statistics_of(graph), *steps)
    assert float((forward(graph.model, inputs) - before).norm() / before.norm()) < 1e-4


def test_the_pairs_are_those_that_alone_lose_least_and_no_block_is_in_two(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    graph = graph_of(checkpoint)
    report = run(graph, statistics, {"parallel_blocks": {"count": 2, "samples": 16}})[0]
    rows = report.rows
    assert len(rows) == 4  # two neighbourships in each stack of three
    chosen = [row for row in rows if row["parallel"]]
    assert {row["block"] for row in chosen} == set(paired(graph.model))
    for row, others in ((chosen[0], rows[:2]), (chosen[1], rows[2:])):
        assert row["error alone, dB"] == min(other["error alone, dB"] for other in others)
    assert report.summary["pairs"] == 2 and report.summary["blocks in a row"] == "4 of 6"
    assert isinstance(report.summary[ERROR], float)


def test_what_is_left_learns_from_the_original(checkpoint: Checkpoint, statistics: Statistics) -> None:
    graph = graph_of(checkpoint)
    lesson = {"distill": {"steps": 30, "layerwise": 2, "rate": 0.0005, "warmup": 3, "batch": 8, "ema": 0.0}}
    report = run(graph, statistics, {"parallel_blocks": {"samples": 16}}, lesson)[1]
    assert report.summary["kept"] and report.summary["error after, dB"] < report.summary["error before, dB"]


@pytest.mark.parametrize(("passes", "says"), [
    ([{"parallel_blocks": {"count": 0}}], "count is 0, must be 1 or more"),
    ([{"parallel_blocks": {"layers": ["blocks"]}}], "'blocks' matches no block that the next could run beside; there are "),
    ([{"parallel_blocks": {}}, {"mob": {"group": 2, "keep": 1}}], "pass 'mob' cannot follow 'parallel_blocks' on"),
    ([{"parallel_blocks": {}}, {"quantize": {"format": "w4a8"}}, {"reconstruct": {"scope": "block"}}],
     "cannot be learned alone; set scope: model"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_computed(
    checkpoint: Checkpoint, passes: list[Any], says: str
) -> None:
    with pytest.raises(DitqError, match=says):
        Recipe.from_dict({"passes": passes}, "test").preview(graph_of(checkpoint))


def test_a_family_is_refused_where_no_two_neighbours_can(checkpoint: Checkpoint) -> None:
    model = small_model("dit")  # of two blocks, of which the first is read elsewhere
    with pytest.raises(DitqError, match="there are none"):
        ParallelBlocks().pairs(DiTGraph(model, small_inputs(model)))


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_blocks_of_a_pair_are_compiled_one_by_one_as_the_target_cuda_does(family: str) -> None:
    graph, found = made(family)
    pair(graph.model, found.second, found.part())
    calls = [small_inputs(graph.model, seed=seed) for seed in (5, 6)]
    expected = [forward(graph.model, inputs) for inputs in calls]
    call = compiled(graph.model, lambda traced, _: traced.forward)
    with torch.no_grad():
        for inputs, wanted in [*zip(calls, expected, strict=True)] * 2:
            answer = call(**inputs, return_dict=False)[0]
            assert relative(answer, wanted) < 1e-6  # what makes queries and keys is added up by its kernel's meaning
