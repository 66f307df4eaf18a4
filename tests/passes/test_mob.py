"""Blocks that run at some timesteps only."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ditq.calibration.batches import CallBatch, sampled_batches, teaching_conditions
from ditq.calibration.calibrate import calibrate
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.cost_model import costs_after, costs_before
from ditq.errors import DitqError
from ditq.export import Engine, load_engine, model_agreement, site_agreement
from ditq.export.fusion import prove_fusion
from ditq.export.targets import cuda
from ditq.export.targets.torch import rebuild
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn import describe
from ditq.nn import rebuild as nn_rebuild
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.scheduled_block import ScheduledBlock, edges_of, patterns_of, scheduled_blocks
from ditq.nn.structural.token_attention import attach, token_attentions
from ditq.numerics.window import Window
from ditq.pass_pipeline import run_passes
from ditq.passes import Context
from ditq.passes.block_groups import grouped
from ditq.passes.expert_load import measure_load
from ditq.passes.feed_forwards import isolated, taylor_importances, tokens_of_places
from ditq.passes.gate import ERROR
from ditq.passes.local_attention import LocalAttentionPass
from ditq.passes.mob import _spec
from ditq.passes.moe import MixtureOfExpertsPass
from ditq.recipe import Recipe
from tests.export.quantized import engine_of, means_torch, quantize_blocks
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of
from tests.small_checkpoint import write_pipeline

PROMPTS = ["red apple", "blue fish", "green leaf", "a star"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_pipeline(tmp_path_factory.mktemp("mob") / "pipeline", layers=2))


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return calibrate(checkpoint, tmp_path_factory.mktemp("mob") / "stats", conditions=PROMPTS, steps=4, progress=False)


def graph_of(checkpoint: Checkpoint) -> DiTGraph:
    return DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))


def run(graph: DiTGraph, statistics: Statistics, *steps: dict[str, Any]) -> list[Any]:
    return run_passes(graph, Recipe.from_dict({"passes": list(steps)}, "test"), statistics)


def scheduled(family: str, runs: list[bool], edges: list[float]) -> tuple[nn.Module, dict[str, Any], str]:
    """A small model whose first block of the last stack runs in those bins; its inputs; that block."""
    graph = small_graph(family)
    stack = list(graph.blocks.values())[-1].stack
    group = grouped(graph, [stack], 1, 1, "test")[0]
    carried, block = group.carried, group.blocks[0]
    spec = {
        "runs": runs, "edges": edges, "arguments": list(carried.arguments), "carried": list(carried.names),
        "widths": list(carried.widths), "bare": carried.bare, "compared": False,
    }  # fmt: skip
    ScheduledBlock.install(graph.model, block, spec)
    for mean in graph.model.get_submodule(block).means:  # type: ignore[union-attr]
        nn.init.normal_(mean)
    return graph.model, small_inputs(graph.model), block


def without(family: str, block: str, means: list[torch.Tensor]) -> nn.Module:
    """The original, that block's forward written out by hand: what it gets, each plus a mean."""
    model = small_graph(family).model
    module = model.get_submodule(block)

    def hands_on(*arguments: Any, **keywords: Any) -> Any:
        if family in ("pixart", "dit"):
            return (arguments[0] if arguments else keywords["hidden_states"]) + means[0]
        text, image = keywords["encoder_hidden_states"], keywords["hidden_states"]
        return text + means[0], image + means[1]

    module.forward = hands_on  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_does_not_run_hands_on_what_it_gets_and_the_mean_of_its_bin(family):
    model, inputs, block = scheduled(family, [True, False], [500.0])
    means = [mean[1] for mean in model.get_submodule(block).means]
    original, shorter = small_graph(family).model, without(family, block, means)
    for timestep, expected in ((900, original), (100, shorter)):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        assert torch.equal(forward(model, inputs), forward(expected, inputs))
    assert not torch.equal(forward(original, inputs), forward(shorter, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_a_batch_go_by_their_own_timesteps(family):
    model, inputs, _ = scheduled(family, [False, True, False], [600.0, 300.0])
    together = []
    for timestep in (700, 400, 100):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        together.append(forward(model, inputs)[1])
    first = inputs["timestep"].clone()
    first[0], first[1] = 400, 100
    inputs["timestep"] = first
    torch.testing.assert_close(forward(model, inputs)[1], together[2], rtol=1e-5, atol=1e-5)
    first[0], first[1] = 100, 400
    torch.testing.assert_close(forward(model, inputs)[1], together[1], rtol=1e-5, atol=1e-5)


def test_the_graph_holds_linears_that_run_at_other_timesteps_too():
    model, inputs, block = scheduled("flux", [False, True], [500.0])
    inputs["timestep"] = torch.full_like(inputs["timestep"], 900)
    assert any(site.startswith(f"{block}.block.") for site in DiTGraph(model, inputs).sites)


def test_a_rebuilt_model_runs_the_same_blocks(checkpoint, statistics):
    graph = graph_of(checkpoint)
    run(graph, statistics, {"mob": {"group": 2, "keep": 1, "bins": 2}})
    fresh = checkpoint.load_model()
    nn_rebuild(fresh, describe(graph.model), graph.model.state_dict())
    assert patterns_of(fresh) == patterns_of(graph.model)
    inputs = example_inputs(checkpoint)
    for timestep in (1.0, 0.05):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        assert torch.equal(forward(fresh, inputs), forward(graph.model, inputs))


def test_blocks_that_others_reach_into_or_that_return_less_always_run():
    """DiT takes the embedding of the timestep from its first block; SD3's last block gives no text."""
    for family, left in (("dit", "transformer_blocks.0"), ("sd3", "transformer_blocks.1")):
        graph = small_graph(family)
        found = [block for group in grouped(graph, ["*"], 1, 1, "test") for block in group.blocks]
        assert set(graph.blocks) - set(found) == {left}


def test_those_blocks_run_without_which_the_answers_lose_most(checkpoint, statistics):
    """With one group the choice of each bin is the least of all that there are, each measured on the whole model by itself."""
    settings = {"group": 2, "keep": 1, "bins": 2, "samples": 16, "select": ["single_transformer_blocks"]}
    graph = graph_of(checkpoint)
    report = run(graph, statistics, {"mob": settings})[0]
    assert [row["block"] for row in report.rows] == ["single_transformer_blocks.0", "single_transformer_blocks.1"]

    original, trial = checkpoint.load_model(), copy.deepcopy(graph.model)
    parts = list(scheduled_blocks(trial).values())
    for part, name in zip(parts, scheduled_blocks(graph.model), strict=True):
        part.block = part.block or original.get_submodule(name)
    recorded = Trajectories.open(statistics.folder / "trajectories")
    batches = sampled_batches(recorded, 16, 8, 0, teaching_conditions(recorded))
    bins = torch.tensor([0, 0, 1, 1])
    for number in range(2):
        lost = []
        for first in (True, False):
            parts[0].runs, parts[1].runs = [first] * 2, [not first] * 2
            wrong = 0.0
            for batch in batches:
                arguments = {**batch.arguments, "return_dict": False}
                with torch.no_grad():
                    difference = trial(**arguments)[0] - original(**arguments)[0]
                wrong += float(difference[bins[batch.steps] == number].double().square().sum())
            lost.append(wrong)
        best = lost[0] < lost[1]
        assert [row["runs"][number] for row in report.rows] == [best, not best]


def test_the_mean_of_what_a_block_adds_is_that_of_its_bin(checkpoint, statistics):
    graph = graph_of(checkpoint)
    settings = {"group": 2, "keep": 1, "bins": 2, "samples": 16, "select": ["transformer_blocks"]}
    run(graph, statistics, {"mob": settings})
    original, added = checkpoint.load_model(), []

    def watch(_: nn.Module, positional: Any, keywords: dict[str, Any], output: Any) -> None:
        added.append((output[1] - keywords["hidden_states"]).double().mean(dim=1))

    original.transformer_blocks[0].register_forward_hook(watch, with_kwargs=True)
    recorded = Trajectories.open(statistics.folder / "trajectories")
    batches = sampled_batches(recorded, 16, 8, 0, teaching_conditions(recorded))
    with torch.no_grad():
        for batch in batches:
            original(**batch.arguments)
    late = torch.cat([batch.steps for batch in batches]) >= 2
    expected = torch.cat(added)[late].mean(dim=0).float()
    torch.testing.assert_close(graph.model.get_submodule("transformer_blocks.0").means[1][1], expected)


def test_without_bins_the_blocks_that_go_are_not_in_the_file(checkpoint, statistics):
    graph = graph_of(checkpoint)
    before = sum(parameter.numel() for parameter in graph.model.parameters())
    report = run(graph, statistics, {"mob": {"group": 2, "keep": 1, "bins": 1}})[0]
    gone = [row["block"] for row in report.rows if row["runs"] == [False]]
    assert len(gone) == 2 and not edges_of(graph.model)
    after = {name for name, _ in graph.model.named_parameters()}
    assert not any(name.startswith(f"{block}.block.") for name in after for block in gone)
    assert sum(parameter.numel() for parameter in graph.model.parameters()) < 0.7 * before
    assert isinstance(report.summary[ERROR], float)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Of a quantized PixArt whose first block runs late only."""
    model, _, _ = scheduled("pixart", [False, True], [500.0])
    return engine_of(
        quantize_blocks(model), tmp_path_factory.mktemp("mob") / "engine", changing=("hidden_states", "timestep")
    )


@pytest.mark.parametrize(("timestep", "file"), [(900, "model.onnx"), (100, "model.1.onnx")])
def test_the_engine_runs_the_graph_of_the_timestep(engine, timestep, file):
    """Both graphs compute what torch means, and all their products are integer."""
    inputs = small_inputs(small_graph("pixart").model)
    inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
    assert engine.graphs == ("model.onnx", "model.1.onnx") and engine.graph_at(inputs["timestep"]) == file
    assert model_agreement(engine, inputs).holds
    means_torch(engine, inputs)
    assert max(site_agreement(engine, inputs).values()) < 1e-3
    meant = forward(rebuild(engine), inputs)
    assert float((load_engine(engine.folder)(**inputs).sample - meant).norm() / meant.norm()) < 0.05


def test_each_product_of_several_graphs_is_planned_and_proven_once(engine):
    proof = prove_fusion(engine)
    assert proof.complete and proof.planned == len({entry.site for entry in engine.planned if entry.kind == "integer"})
    inside = [entry for entry in engine.planned if entry.site.startswith("transformer_blocks.0.")]
    assert inside and {entry.graph for entry in inside} == {"model.1.onnx"}
    assert engine.files["weights.safetensors"]["bytes"] < 1.1 * sum(
        tensor.nbytes for tensor in load_file(engine.folder / "weights.safetensors").values()
    )


def test_one_call_for_timesteps_of_several_graphs_is_refused_by_a_graph_and_run_by_torch(engine):
    inputs = small_inputs(small_graph("pixart").model)
    inputs["timestep"] = torch.tensor([900.0, 100.0]).to(inputs["timestep"])
    with pytest.raises(DitqError, match="call it for each timestep alone"):
        load_engine(engine.folder)(**inputs)
    assert torch.isfinite(load_engine(engine.folder, "torch")(**inputs).sample).all()


@pytest.mark.parametrize(
    "schedule",
    [
        {"edges": [500.0], "graphs": ["model.onnx"]},
        {"edges": ["x"], "graphs": ["model.onnx", "model.onnx"]},
        {"edges": [500.0], "graphs": ["model.onnx", 1]},
        {"edges": [500.0]},
        [],
    ],
)
def test_a_damaged_schedule_is_refused_in_one_line(engine, tmp_path, schedule):
    folder = shutil.copytree(engine.folder, tmp_path / "engine")
    Engine(folder, engine.manifest).update(schedule=schedule)
    with pytest.raises(DitqError, match=r"damaged \(no valid 'schedule'\); compile the engine again"):
        Engine.open(folder)


def test_a_schedule_cannot_name_a_file_outside_of_the_engine(engine, tmp_path):
    folder = shutil.copytree(engine.folder, tmp_path / "engine")
    Engine(folder, engine.manifest).update(schedule={"edges": [500.0], "graphs": ["model.onnx", "../model.onnx"]})
    with pytest.raises(DitqError, match=r"model\.onnx"):
        Engine.open(folder)


def test_the_target_that_captures_calls_refuses_blocks_that_come_and_go(checkpoint, statistics):
    graph = graph_of(checkpoint)
    run(graph, statistics, {"mob": {"group": 2, "keep": 1, "bins": 1, "samples": 16}})
    cuda.check(graph.model)
    model, _, _ = scheduled("flux", [False, True], [500.0])
    with pytest.raises(DitqError, match="set bins: 1 in mob, or compile for another target"):
        cuda.check(model)


@pytest.mark.parametrize("bins", [1, 2])
def test_what_is_left_learns_from_the_original(checkpoint, statistics, bins):
    graph = graph_of(checkpoint)
    lesson = {"distill": {"steps": 30, "layerwise": 2, "rate": 0.0005, "warmup": 3, "batch": 8, "ema": 0.0}}
    report = run(graph, statistics, {"mob": {"group": 2, "keep": 1, "bins": bins, "samples": 16}}, lesson)[1]
    assert report.curves[0]["features"] > 0
    assert report.summary["kept"] and report.summary["error after, dB"] < report.summary["error before, dB"]


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_scales_shifts_and_rotations_leave_scheduled_blocks_as_they_are(family):
    """What is carried past a block that does not run is the residual, which neither fold touches."""
    model, inputs, _ = scheduled(family, [False, True], [500.0])
    graph = DiTGraph(model, inputs)
    expected = []
    for timestep in (900, 100):
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        expected.append((timestep, forward(model, inputs)))
    recipe = Recipe.from_dict(
        {"passes": [{"smooth": {"alpha": 0.5, "centre": True}}, {"rotate": {"mode": "hadamard"}}]}, "test"
    )
    run_passes(
        graph, recipe, statistics_of(graph, inputs=[{**inputs, "timestep": inputs["timestep"].clone().fill_(100)}])
    )
    for timestep, before in expected:
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
        assert float((forward(graph.model, inputs) - before).norm() / before.norm()) < 1e-4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group": 1, "keep": 1}, "keep from 1 to less than group"),
        ({"group": 2, "keep": 2}, "keep from 1 to less than group"),
        ({"bins": 0}, "bins is 0"),
        ({"select": ["blocks"]}, "matches no stack of blocks; there are transformer_blocks, single_transformer_blocks"),
        ({"group": 7, "keep": 1}, "fewer than group: 7"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(checkpoint, settings, said):
    with pytest.raises(DitqError, match=said):
        Recipe.from_dict({"passes": [{"mob": settings}]}, "test").preview(graph_of(checkpoint))


def test_the_cost_of_a_group_is_that_of_the_blocks_that_run(checkpoint):
    graph = graph_of(checkpoint)
    for bins, kept in ((1, 0.5), (4, 1.0)):
        recipe = Recipe.from_dict({"passes": [{"mob": {"group": 2, "keep": 1, "bins": bins}}]}, "test")
        before, after = costs_before(graph), costs_after(graph, recipe)
        for part in ("token linears", "feed-forward", "attention scores"):
            assert after.macs[part] == pytest.approx(before.macs[part] / 2, rel=1e-6)
        site = graph.sites["single_transformer_blocks.0.proj_mlp"]
        assert after.works[site.name].parameters == kept * site.parameters
        assert after.works[site.name].activated == site.parameters / 2


def batches_at(inputs: dict[str, Any], timesteps: list[float]) -> list[CallBatch]:
    """A batch of recorded calls for each timestep alone."""
    found = []
    for number, timestep in enumerate(timesteps):
        given = {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}
        found.append(CallBatch(given, torch.full((len(inputs["timestep"]),), number)))
    return found


@pytest.mark.parametrize("weighting", ["answer", "none"])
def test_batches_that_do_not_run_a_block_say_nothing_of_its_feed_forward(weighting):
    """The same is measured as on the batches that run it alone."""
    model, inputs, block = scheduled("pixart", [True, False], [500.0])
    graph, context = DiTGraph(model, inputs), Context()
    (place,) = isolated(graph, [f"{block}.*"], "moe")
    with_others, alone = batches_at(inputs, [100, 900, 50]), batches_at(inputs, [0, 900])[1:]
    with torch.no_grad():
        (_, tokens), (_, expected) = (
            next(tokens_of_places(model, [place], batches, 10**6, weighting, context))
            for batches in (with_others, alone)
        )
        assert torch.equal(tokens.x, expected.x)
        found = taylor_importances(model, [place], with_others, context)[place.module]
    assert float(found.min()) >= 0 and float(found.max()) > 0
    with pytest.raises(DitqError, match="raise samples"):
        next(tokens_of_places(model, [place], batches_at(inputs, [100]), 100, weighting, context))


def test_the_load_of_experts_is_measured_where_their_block_runs():
    model, inputs, block = scheduled("pixart", [True, False], [500.0])
    graph = DiTGraph(model, inputs)
    MixtureOfExpertsPass(experts=2, top=1, select=[f"{block}.*"]).sketch(graph)
    measured = [measure_load(model, batches_at(inputs, some), Context()) for some in ([100, 900], [900], [100])]
    assert not measured[2]
    for (name, load), expected in zip(measured[0].items(), measured[1].values(), strict=True):
        assert name.startswith(f"{block}.") and torch.equal(load.share, expected.share)


def test_an_attention_that_was_converted_is_found_in_the_block_that_is_scheduled_afterwards():
    graph = small_graph("flux")
    group = grouped(graph, ["transformer_blocks"], 1, 1, "test")[0]
    block, site = group.blocks[0], f"{group.blocks[0]}.attn"
    attach(graph.model, LocalAttention(site, graph.layout, 2, 32, True, 0, window=Window("tiles", 1, 2)))
    ScheduledBlock.install(graph.model, block, _spec(group, 0, [True, False], [500.0]))
    graph.refresh()
    assert set(token_attentions(graph.model)) == {f"{block}.block.attn"}
    others = [name for name in graph.attentions if not name.startswith(block)]
    assert others and f"{block}.block.attn" in graph.attentions
    said = Recipe.from_dict({"passes": [{"quantize_attention": {"select": others}}]}, "test").preview(graph)
    assert said
    assert set(LocalAttentionPass().chosen(graph)) == set(others)
