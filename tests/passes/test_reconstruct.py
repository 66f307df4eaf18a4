"""reconstruct: learns against the original's own outputs, never makes held-out calls worse, and leaves a plain engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditq.calibration.batches import batch_size, joined, sampled_batches
from ditq.calibration.calibrate import calibrate
from ditq.calibration.record import Trajectories
from ditq.calibration.sampler import find_sampler
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn import QuantLinear
from ditq.pass_pipeline import run_passes
from ditq.passes import Context
from ditq.passes.guided_error import guidance_of
from ditq.passes.mob import MixtureOfBlocks
from ditq.passes.reconstruct import Reconstruct, _comparable, _energy, _Example
from ditq.recipe import Recipe
from ditq.site_cache import FolderSiteCache
from tests.small_checkpoint import write_pipeline

PROMPTS = ["red apple", "blue fish", "green leaf", "a star"]
QUANTIZE = {"format": "w3a8", "select": ["role:token", "role:modulation"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_pipeline(tmp_path_factory.mktemp("reconstruct") / "pipeline"))


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    folder = tmp_path_factory.mktemp("reconstruct") / "stats"
    return calibrate(checkpoint, folder, conditions=PROMPTS, steps=8, progress=False)


@pytest.fixture(scope="module")
def mini_statistics(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    folder = tmp_path_factory.mktemp("reconstruct") / "mini"
    return calibrate("mini", folder, steps=6, limit=6, progress=False)


def _graph(checkpoint: Checkpoint) -> DiTGraph:
    return DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))


def _run(graph: DiTGraph, statistics: Statistics, settings: dict[str, object] | None):
    steps = [{"quantize": QUANTIZE}] + ([] if settings is None else [{"reconstruct": settings}])
    return run_passes(graph, Recipe.from_dict({"passes": steps}, "test"), statistics)[-1]


def _error(original: torch.nn.Module, graph: DiTGraph, statistics: Statistics) -> float:
    """Relative squared error of the denoiser on all recorded calls."""
    assert statistics.folder is not None
    lost = total = 0.0
    with torch.no_grad():
        for batch in sampled_batches(Trajectories.open(statistics.folder / "trajectories"), 1000, 16):
            wanted = original(**batch.arguments)[0]
            lost += float((graph.model(**batch.arguments)[0] - wanted).square().sum())
            total += float(wanted.square().sum())
    return lost / total


@pytest.mark.parametrize("scope", ["block", "model"])
def test_it_brings_a_trained_denoiser_nearer_to_the_original(mini_statistics: Statistics, scope: str) -> None:
    """One block of the trained checkpoint in 3 bits; what is learned of 7 batches holds on all recorded calls."""
    block, checkpoint = "single_transformer_blocks.5", Checkpoint.open("mini")
    graphs = [_graph(checkpoint) for _ in range(2)]
    coded = {"format": "w3a8", "select": [f"{block}.*"]}
    learn = {"scope": scope, "steps": 40, "samples": 64} | ({"select": [block]} if scope == "block" else {})
    for graph, steps in zip(
        graphs, ([{"quantize": coded}], [{"quantize": coded}, {"reconstruct": learn}]), strict=True
    ):
        report = run_passes(graph, Recipe.from_dict({"passes": steps}, "test"), mini_statistics)[-1]
    (row,) = report.rows
    assert row["block"] == (block if scope == "block" else "the model")
    assert row["kept"] and row["error after"] < row["error before"]
    original = checkpoint.load_model()
    plain, learned = (_error(original, graph, mini_statistics) for graph in graphs)
    assert learned < plain
    assert not any("Learned" in type(module).__name__ for module in graphs[1].model.modules())


def test_blocks_behind_gates_that_are_shut_lose_nothing_and_stay(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    graph = _graph(checkpoint)
    for name, parameter in graph.model.named_parameters():
        if ".norm" in name and ".linear." in name:
            parameter.data.zero_()
    report = _run(graph, statistics, {"scope": "block", "steps": 2, "samples": 4, "batch": 2})
    assert report.rows and all(row["error before"] == 0 and not row["kept"] for row in report.rows)
    assert report.summary["mean share of the error left"] == 1


def test_what_does_not_help_held_out_calls_is_dropped(checkpoint: Checkpoint, statistics: Statistics) -> None:
    plain, learned = _graph(checkpoint), _graph(checkpoint)
    _run(plain, statistics, None)
    report = _run(
        learned, statistics, {"scope": "block", "steps": 2, "samples": 4, "batch": 2, "rate": 50.0}
    )  # overshoots by far
    assert not any(row["kept"] for row in report.rows)
    expected = plain.model.state_dict()
    for name, tensor in learned.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_finished_blocks_are_taken_from_an_interrupted_run(
    checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_dict(
        {"passes": [{"quantize": QUANTIZE}, {"reconstruct": {"scope": "block", "steps": 3, "samples": 4, "batch": 2}}]},
        "test",
    )
    states, reports = [], []
    for attempt in range(2):
        graph, context = _graph(checkpoint), Context(statistics, 0, FolderSiteCache(tmp_path, {}), keep_weights=True)
        with torch.no_grad():
            for step in recipe.passes:
                step.prepare(graph, context)
            if attempt:
                monkeypatch.setattr(Reconstruct, "_learn", lambda *_: pytest.fail("learned already"))
            reports.append([step.run(graph, context) for step in recipe.passes][-1])
        states.append(graph.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert reports[0].rows and reports[0].to_json() == reports[1].to_json()


def test_the_pass_may_stand_twice(checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path) -> None:
    """The second one starts where the first one ended, also where finished parts are kept."""
    learn = {"scope": "model", "steps": 2, "samples": 8, "batch": 4}
    steps = [{"quantize": QUANTIZE}, {"reconstruct": learn}, {"reconstruct": {**learn, "steps": 3}}]
    first, second = run_passes(
        _graph(checkpoint), Recipe.from_dict({"passes": steps}, "test"), statistics, checkpoint, tmp_path
    )[1:]
    assert second.rows[0]["error before"] == pytest.approx(first.rows[0]["error after"], rel=1e-6)
    assert len(list(tmp_path.rglob("reconstruct.*.model.safetensors"))) == 2


def test_calls_of_one_batch_are_refused_before_anything_is_learned(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    with pytest.raises(DitqError, match=r"fit one batch of 64, .*; set batch lower"):
        _run(_graph(checkpoint), statistics, {"samples": 128, "batch": 64})


def test_what_auto_has_decided_holds_when_a_pass_has_made_the_model_smaller(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    """The outputs that were recorded are those of what was decided on the original."""
    weights = sum(site.parameters for site in _graph(checkpoint).sites.values())
    learn = {"scope": "auto", "memory": 15.9 * weights / 1e9, "steps": 1, "samples": 4, "batch": 2}
    steps = [{"prune": {"keep": 0.5, "samples": 8, "rows": 64}}, {"quantize": QUANTIZE}, {"reconstruct": learn}]
    report = run_passes(_graph(checkpoint), Recipe.from_dict({"passes": steps}, "test"), statistics)[-1]
    assert [row["block"] for row in report.rows] == list(_graph(checkpoint).blocks)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({"token_order": {"tile": 2}}, "token_order has moved .*set scope: model"),
        ({"mob": {"group": 2, "keep": 1, "bins": 2}}, "some timesteps only, by mob, .*set scope: model"),
    ],
)
def test_blocks_that_cannot_be_compared_alone_are_refused(tmp_path: Path, before: dict[str, object], said: str) -> None:
    graph = _graph(Checkpoint.open(write_pipeline(tmp_path / "pipeline", layers=2)))
    for scope in ("block", "model"):
        recipe = Recipe.from_dict({"passes": [before, {"quantize": {}}, {"reconstruct": {"scope": scope}}]}, "test")
        if scope == "model":
            recipe.preview(graph)
        else:
            with pytest.raises(DitqError, match=said):
                recipe.preview(graph)


def test_a_block_that_stands_for_others_is_compared_and_those_before_it_are_not(tmp_path: Path) -> None:
    """Of two blocks of which one runs, what comes out behind the last is what the original's gave."""
    graph = _graph(Checkpoint.open(write_pipeline(tmp_path / "pipeline", layers=2)))
    MixtureOfBlocks(group=2, keep=1, bins=1).sketch(graph)
    last = ["transformer_blocks.1", "single_transformer_blocks.1"]
    assert _comparable(graph.model, list(graph.blocks)) == last


def test_layers_of_eight_bits_are_left_alone(checkpoint: Checkpoint, statistics: Statistics) -> None:
    graph = _graph(checkpoint)
    steps = [{"quantize": {"format": "w8a8"}}, {"reconstruct": {"steps": 1, "samples": 4, "batch": 2}}]
    assert run_passes(graph, Recipe.from_dict({"passes": steps}, "test"), statistics)[-1].rows == []
    assert any(isinstance(module, QuantLinear) for module in graph.model.modules())


def test_joined_calls_give_what_each_gives_alone(checkpoint: Checkpoint, statistics: Statistics) -> None:
    assert statistics.folder is not None
    calls = [call.arguments for call in Trajectories.open(statistics.folder / "trajectories").calls()][:3]
    model = checkpoint.load_model()
    with torch.no_grad():
        together = model(**joined(calls))[0]
        alone = torch.cat([model(**call)[0] for call in calls])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_sampled_batches_cover_conditions_and_steps_evenly(statistics: Statistics) -> None:
    assert statistics.folder is not None
    trajectories = Trajectories.open(statistics.folder / "trajectories")
    batches = sampled_batches(trajectories, 8, 3)
    sizes = [batch_size(batch.arguments) for batch in batches]
    assert sum(sizes) == 8 and max(sizes) == 3 and [len(batch.steps) for batch in batches] == sizes
    steps = torch.cat([batch.steps for batch in batches]).bincount(minlength=trajectories.steps)
    assert steps.max() - steps.min() <= 1
    again = sampled_batches(trajectories, 8, 3)
    assert all(torch.equal(a.steps, b.steps) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rate": 0.0}, "rate is 0"),
        ({"samples": 8, "batch": 8}, "two batches of 8"),
        ({"scope": "all"}, "scope"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(DitqError, match=said):
        Recipe.from_dict({"passes": [{"quantize": {}}, {"reconstruct": settings}]}, "test")


def test_statistics_without_recorded_calls_are_refused(checkpoint: Checkpoint, statistics: Statistics) -> None:
    in_memory = Statistics(
        {name: statistics.groups[name] for name in statistics.groups}, statistics.sites, statistics.metadata
    )
    with pytest.raises(DitqError, match="recorded calls"):
        _run(_graph(checkpoint), in_memory, {"samples": 4, "batch": 2})


def test_a_pattern_that_matches_no_block_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(DitqError, match=r"'blocks\.9' matches no block; there are transformer_blocks\.0"):
        Reconstruct(select=["blocks.9"]).preview(_graph(checkpoint))


def test_a_model_is_learned_by_block_where_it_does_not_fit_as_a_whole(checkpoint: Checkpoint) -> None:
    graph = _graph(checkpoint)
    weights = sum(site.parameters for site in graph.sites.values())
    assert Reconstruct(memory=17 * weights / 1e9)._units(graph) == [""]
    assert Reconstruct(memory=15 * weights / 1e9)._units(graph) == list(graph.blocks)
    first = next(iter(graph.blocks))
    assert Reconstruct(memory=17 * weights / 1e9, select=[first])._units(graph) == [first]


def test_a_recipe_with_nothing_to_learn_is_refused() -> None:
    with pytest.raises(DitqError, match="works on what quantize made; put quantize before it"):
        Recipe.from_dict({"passes": [{"smooth": {}}, {"reconstruct": {}}]}, "test")


def test_branches_of_a_step_are_learned_together_as_guidance_joins_them(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is that of the guided answers, plus a quarter of what each answer loses alone, computed here by hand."""
    guided = calibrate(
        checkpoint, tmp_path / "guided", PROMPTS[:2], 3,
        arguments={"true_cfg_scale": 4.0, "negative_prompt": ""}, progress=False,
    )  # fmt: skip
    assert guided.folder is not None
    trajectories = Trajectories.open(guided.folder / "trajectories")
    (batch,) = sampled_batches(trajectories, 1000, 1000)
    assert batch.branches == 2 and len(batch.steps) == 12
    assert torch.equal(batch.steps[0::2], batch.steps[1::2])
    assert torch.equal(batch.arguments["hidden_states"][0::2], batch.arguments["hidden_states"][1::2])
    sampler = find_sampler(checkpoint.load_model(), trajectories)
    assert sampler is not None
    torch.testing.assert_close(sampler.guidance(), torch.tensor([[4.0, -3.0]] * 3), rtol=1e-3, atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    lost = torch.randn(batch.arguments["hidden_states"].shape, generator=generator)
    example = _Example(((), batch.arguments), [lost], torch.ones(12), guidance_of(batch, sampler))
    joined_loss = (4 * lost[0::2] - 3 * lost[1::2]).square().sum()
    torch.testing.assert_close(_energy(example), joined_loss + 0.25 * lost.square().sum(), rtol=1e-3, atol=0)
    report = _run(_graph(checkpoint), guided, {"steps": 2, "samples": 12, "batch": 4})
    assert report.summary["branches joined as"] == "4, -3"
