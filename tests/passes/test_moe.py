"""Feed-forwards that become experts, or narrower ones."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch

from ditq.calibration.calibrate import calibrate
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.compiler import CompileOptions, compile
from ditq.errors import DitqError
from ditq.export import load_engine, model_agreement, site_agreement
from ditq.export.fusion import prove_fusion
from ditq.export.targets.torch import rebuild
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn.structural.experts import MixtureOfExperts
from ditq.nn.structural.pruned import PrunedFeedForward
from ditq.parts import LinearModulation
from ditq.pass_pipeline import run_passes
from ditq.passes.expert_load import SPARED, _capacity
from ditq.passes.gate import ERROR
from ditq.passes.moe import CROWDED
from ditq.recipe import Recipe
from ditq.report.layers import per_layer_sqnr
from tests.export.quantized import means_torch
from tests.families_small import forward, small_graph
from tests.small_checkpoint import write_pipeline

PROMPTS = ["red apple", "blue fish", "green leaf", "a star"]
EXPERTS = {"experts": 6, "samples": 24, "rows": 512, "choice": "token"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_pipeline(tmp_path_factory.mktemp("moe") / "pipeline"))


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return calibrate(checkpoint, tmp_path_factory.mktemp("moe") / "stats", conditions=PROMPTS, steps=4, progress=False)


def graph_of(checkpoint: Checkpoint) -> DiTGraph:
    return DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))


def run(graph: DiTGraph, statistics: Statistics, *steps: dict) -> list:
    return run_passes(graph, Recipe.from_dict({"passes": list(steps)}, "test"), statistics)


def test_every_feed_forward_becomes_a_mixture_of_its_own_channels(checkpoint, statistics):
    graph = graph_of(checkpoint)
    before = copy.deepcopy(graph.model)
    count = len(graph.feed_forwards)
    report = run(graph, statistics, {"moe": EXPERTS})[0]
    mixtures = [part for part in graph.model.modules() if isinstance(part, MixtureOfExperts)]
    assert len(mixtures) == count == len(report.rows)
    assert not any(part.training for part in graph.model.modules())  # in training they would keep gradients
    for row in report.rows:
        assert 0 <= row["error"] < 1 and sum(row["load"]) == pytest.approx(2 * (1 - row["dropped"]), abs=1e-3)
    # nothing new but routers: what is left of the parameters of linears is what was there
    weights = sum(p.numel() for name, p in graph.model.named_parameters() if p.dim() > 1 and ".router." not in name)
    assert weights == sum(p.numel() for p in before.parameters() if p.dim() > 1)


def test_a_feed_forward_that_never_changes_gets_a_router_of_numbers(checkpoint, statistics):
    """Its last weight is zero: nothing tells experts apart."""
    graph = graph_of(checkpoint)
    site = next(iter(graph.feed_forwards))
    for name, weight in graph.model.named_parameters():
        if name.startswith(site) and name.endswith("net.2.weight"):
            weight.data.zero_()
    run(graph, statistics, {"moe": {**EXPERTS, "select": [f"{site}*"]}})
    assert any(isinstance(part, MixtureOfExperts) for part in graph.model.modules())
    assert all(tensor.isfinite().all() for tensor in graph.model.state_dict().values())


def test_means_and_differences_from_them_add_up_to_the_dense_output(checkpoint, statistics):
    """With all experts for all tokens and nothing fitted anew, the model is as before: what is in biases cancels out."""
    graph = graph_of(checkpoint)
    inputs = example_inputs(checkpoint)
    expected = forward(graph.model, inputs)
    run(graph, statistics, {"moe": EXPERTS | {"top": 6, "capacity": 1.0, "refit": False}})
    assert float((forward(graph.model, inputs) - expected).norm() / expected.norm()) < 1e-5


def test_experts_choose_where_too_many_tokens_would_find_no_slot(checkpoint, statistics):
    """Tokens of padded text are alike and all ask the same experts; those of the picture are not."""
    by_tokens = run(graph_of(checkpoint), statistics, {"moe": EXPERTS})[0]
    graph = graph_of(checkpoint)
    report = run(graph, statistics, {"moe": EXPERTS | {"choice": "auto"}})[0]
    crowded = [row["feed-forward"] for row in by_tokens.rows if row["dropped"] > CROWDED]
    assert 0 < len(crowded) < len(report.rows) and any("context" in name for name in crowded)
    for row in report.rows:
        expert = row["feed-forward"] in crowded
        assert row["chosen by"] == ("experts" if expert else "tokens")
        assert row["dropped"] <= (0 if expert else CROWDED)
        if expert:  # every expert has the same share of the tokens
            assert row["least load"] == pytest.approx(row["most load"])
    for row, other in zip(report.rows, by_tokens.rows, strict=True):
        if row["feed-forward"] not in crowded:
            assert row["error"] == other["error"]


def test_the_graph_knows_experts_as_linears_of_one_input(checkpoint, statistics):
    graph = graph_of(checkpoint)
    feeds = {ff.inputs[0]: graph.groups[graph.sites[ff.inputs[0]].group].feed for ff in graph.feed_forwards.values()}
    run(graph, statistics, {"moe": EXPERTS | {"select": ["transformer_blocks.0.ff.net.2"]}})
    place = "transformer_blocks.0.ff"
    group = graph.groups[f"{place}.shared.net.0.proj"]
    assert set(group.sites) == {
        f"{place}.shared.net.0.proj", f"{place}.router", *(f"{place}.experts.{i}.net.0.proj" for i in range(6)),
    }  # fmt: skip
    assert isinstance(group.feed, LinearModulation) and group.feed == feeds[f"{place}.net.0.proj"]
    assert graph.sites[f"{place}.router"].kind == "router"
    assert graph.sites[f"{place}.experts.3.net.2"].kind == "feed_forward_out"


def test_a_router_of_representative_channels_is_known_as_one(checkpoint, statistics):
    graph = graph_of(checkpoint)
    run(graph, statistics, {"moe": EXPERTS | {"router": "representative", "select": ["transformer_blocks.0.ff.net.2"]}})
    assert graph.sites["transformer_blocks.0.ff.router.channels.net.0.proj"].kind == "router"


def test_an_attention_beside_separate_experts_keeps_its_folds(checkpoint, statistics):
    graph = graph_of(checkpoint)
    place = "single_transformer_blocks.0"
    before, group = graph.attentions[f"{place}.attn"], graph.sites[f"{place}.proj_mlp"].group
    feed = graph.groups[group].feed
    run(graph, statistics, {"moe": EXPERTS | {"select": [f"{place}.proj_out"]}})
    (output,) = graph.attentions[f"{place}.attn"].outputs
    assert (output.site, output.start, output.stop) == (f"{place}.proj_out.other", 0, before.outputs[0].stop)
    assert graph.attentions[f"{place}.attn"].foldable and before.foldable
    shared = graph.groups[graph.sites[f"{place}.proj_mlp.shared.linear_in"].group]
    assert shared.feed == feed and isinstance(feed, LinearModulation)
    assert {f"{place}.attn.to_q", f"{place}.proj_mlp.router", f"{place}.proj_mlp.experts.5.linear_in"} <= set(
        shared.sites
    )


def test_scales_shifts_and_rotations_pass_through_experts_exactly(checkpoint, statistics):
    """smooth and rotate behind moe leave the function as it is: the router reads what they change as well."""
    graph = graph_of(checkpoint)
    run(graph, statistics, {"moe": EXPERTS})
    inputs = example_inputs(checkpoint)
    expected = forward(graph.model, inputs)
    again = graph_of(checkpoint)
    run(again, statistics, {"moe": EXPERTS}, {"smooth": {"alpha": 0.5}}, {"rotate": {"mode": "hadamard"}})
    difference = (forward(again.model, inputs) - expected).norm() / expected.norm()
    assert float(difference) < 1e-4  # the same experts for every token, and float32


SEARCHED = {"mode": "search", "format": "w4a4", "kinds": ["block_hadamard", "identity"], "tolerance": 0.0}


@pytest.mark.parametrize("settings", [SEARCHED, {"mode": "quantile", "quantile": 1.0}])
def test_all_experts_of_a_feed_forward_get_one_rotation(checkpoint, statistics, settings):
    """Chosen by all of them, so that one kernel rounds what goes into their output linears."""
    graph = graph_of(checkpoint)
    moe, rotate = run(graph, statistics, {"moe": EXPERTS}, {"rotate": settings})
    kinds = {row["input"]: row["kind"] for row in rotate.rows}
    for place, part in graph.model.named_modules():
        if isinstance(part, MixtureOfExperts):
            outputs = [f"{place}.{name}" for name in part.alike()[0]]
            layers = [graph.linear(name) for name in outputs]
            assert len({kinds[name] for name in outputs}) == 1 and len(layers) == EXPERTS["experts"]
            if kinds[outputs[0]] == "identity":
                continue
            matrices = [layer.transform.rotations[0][2].matrix() for layer in layers]
            assert all(torch.equal(matrix, matrices[0]) for matrix in matrices)
    assert moe.rows and set(kinds.values()) - {"identity"}


def test_pruned_feed_forwards_are_fitted_to_the_dense_ones(checkpoint, statistics):
    errors = {}
    for refit in (False, True):
        graph = graph_of(checkpoint)
        report = run(graph, statistics, {"prune": {"keep": 0.5, "refit": refit, "samples": 24, "rows": 1024}})[0]
        assert any(isinstance(part, PrunedFeedForward) for part in graph.model.modules())
        errors[refit] = report.summary["mean error"]
        assert isinstance(report.summary[ERROR], float)
    assert errors[True] < errors[False]


@pytest.mark.parametrize("importance", ["needed", "taylor", "activation", "random"])
def test_what_matters_is_told_in_several_ways(checkpoint, statistics, importance):
    settings = {
        "keep": 0.5,
        "importance": importance,
        "samples": 8,
        "rows": 256,
        "select": ["single_transformer_blocks.0.*"],
    }
    (report,) = run(graph_of(checkpoint), statistics, {"prune": settings})
    assert 0 <= report.rows[0]["error"] < 1


def test_all_channels_kept_is_the_model_as_it_was(checkpoint, statistics):
    graph = graph_of(checkpoint)
    inputs = example_inputs(checkpoint)
    expected = forward(graph.model, inputs)
    run(graph, statistics, {"prune": {"keep": 1.0, "samples": 24, "rows": 2048}})
    assert float((forward(graph.model, inputs) - expected).norm() / expected.norm()) < 2e-3  # the fit's damping


def test_the_better_form_is_taken_for_each_feed_forward(checkpoint, statistics):
    graph = graph_of(checkpoint)
    (report,) = run(graph, statistics, {"moe": EXPERTS | {"choose": "better", "margin": 0.0}})
    for row in report.rows:
        assert (row["form"] == "experts") == (row["answers lose"] <= row["with pruned"])
    forms = [
        type(part).__name__ for part in graph.model.modules() if isinstance(part, (MixtureOfExperts, PrunedFeedForward))
    ]
    assert len(forms) == len(report.rows)


def test_the_capacity_goes_by_the_load_where_it_is_asked_to(checkpoint, statistics, monkeypatch):
    (report,) = run(graph_of(checkpoint), statistics, {"moe": EXPERTS | {"capacity": "auto"}})
    capacities = [row["capacity"] for row in report.rows]
    assert all(1 <= capacity <= 2 for capacity in capacities) and max(capacities) > 1
    assert all(row["dropped"] <= SPARED + 1e-6 or row["capacity"] == 2 for row in report.rows)
    monkeypatch.setattr("ditq.passes.moe.MOST", 1.0)
    graph = graph_of(checkpoint)
    (report,) = run(graph, statistics, {"moe": EXPERTS | {"capacity": "auto"}})
    assert [row["capacity"] for row in report.rows] == [1.0] * len(capacities)
    assert {part.spec()["capacity"] for part in graph.model.modules() if isinstance(part, MixtureOfExperts)} == {1.0}


def test_the_least_capacity_at_which_few_answers_find_no_slot():
    """Four experts, eight tokens that ask one each: an equal share is 2 slots."""
    chosen = torch.zeros(1, 4, 8)
    for token, expert in enumerate((0, 0, 0, 1, 1, 2, 2, 3)):
        chosen[0, expert, token] = 1
    assert _capacity(chosen, 1) == 1.125  # 3 slots of ceil(2.25)
    assert _capacity(torch.eye(4).repeat(1, 2)[None], 1) == 1.0


@pytest.mark.parametrize("step", [{"prune": {"keep": 0.5, "samples": 24, "rows": 512}}, {"moe": EXPERTS}])
def test_a_feed_forward_behind_a_gate_that_is_shut_is_fitted_to_its_own_output(checkpoint, statistics, step):
    """No token of it moves the model's answer, so that all count alike."""
    graph = graph_of(checkpoint)
    for parameter in graph.model.get_submodule("transformer_blocks.0.norm1.linear").parameters():
        parameter.data.zero_()
    (report,) = run(graph, statistics, step)
    assert 0 < report.rows[0]["error"] < 1
    assert all(torch.isfinite(parameter).all() for parameter in graph.model.parameters())


@pytest.mark.parametrize(
    ("experts", "share"), [(2.0, 0.5), (0.9, 0.0), (3.1, 1.0)], ids=["between", "faster", "slower"]
)
def test_the_pruned_form_is_as_wide_as_takes_the_time_of_experts(checkpoint, statistics, monkeypatch, experts, share):
    """Said to take 1 as narrow as the experts' active channels, 3 as wide as the dense one."""
    asked = []

    def seconds(parts, x):
        narrow, dense, mixture = parts
        assert isinstance(narrow, PrunedFeedForward) and isinstance(mixture, MixtureOfExperts)
        assert dense(x).shape == mixture(x).shape == x.shape
        asked.append(x.shape)
        return [1.0, 3.0, experts]

    monkeypatch.setattr("ditq.pass_pipeline.seconds_of", seconds)
    graph = graph_of(checkpoint)
    (report,) = run(graph, statistics, {"moe": EXPERTS | {"choose": "latency", "margin": 0.0}})
    assert len(asked) == len(set(asked)) > 0  # once for those of one size
    for row in report.rows:
        wanted = row["active"] + share * (row["hidden"] - row["active"])
        assert abs(row["pruned to"] - wanted) <= 8
        assert (row["form"] == "dense") == (share == 1.0)
        if row["form"] != "dense":
            assert (row["form"] == "experts") == (row["answers lose"] <= row["with pruned"])
    kinds = [type(part) for part in graph.model.modules()]
    changed = sum(kinds.count(kind) for kind in (MixtureOfExperts, PrunedFeedForward))
    assert changed == (0 if share == 1.0 else len(report.rows))


def test_a_width_that_was_measured_once_holds_when_resumed_and_in_every_process(
    checkpoint, statistics, monkeypatch, tmp_path
):
    """Times differ, so what the first process found is kept, and told to the others."""
    told = []

    def compiled(seconds, work):
        monkeypatch.setattr("ditq.pass_pipeline.seconds_of", seconds)
        recipe = Recipe.from_dict({"passes": [{"moe": EXPERTS | {"choose": "latency", "margin": 0.0}}]}, "test")
        return run_passes(graph_of(checkpoint), recipe, statistics, checkpoint, work)[0].rows

    def tell(value):
        told.append(value)
        return value

    def unasked(parts, x):
        pytest.fail("measured already")

    monkeypatch.setattr("ditq.passes.better_form.agreed", tell)
    rows = compiled(lambda parts, x: [1.0, 3.0, 2.0], tmp_path)
    assert compiled(unasked, tmp_path) == rows
    first = told[: len(rows)]
    monkeypatch.setattr("ditq.passes.better_form.is_first", lambda: False)
    monkeypatch.setattr("ditq.passes.better_form.agreed", lambda value: first.pop(0))
    assert compiled(unasked, None) == rows


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top": 7, "experts": 6}, "top from 1 to experts"),
        ({"shared": 1.0}, "shared is 1.0"),
        ({"capacity": 0.5}, "capacity is 0.5"),
        ({"samples": 0}, "samples is 0, must be 1"),
        ({"margin": 1.0}, "margin is 1.0"),
        ({"split": "kmeans"}, "split"),
    ],
)
def test_wrong_settings_are_one_line(settings, says):
    with pytest.raises(DitqError, match=says) as error:
        Recipe.from_dict({"passes": [{"moe": settings}]}, "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"select": ["nothing*"]}, "matches no feed-forward"),
        ({"experts": 1000}, "too few for 1000 experts"),
        ({"shared": 0.0, "experts": 4}, "shared: 0.0 leaves no channel for all tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_told_before_anything_is_computed(settings, says):
    with pytest.raises(DitqError, match=says):
        Recipe.from_dict({"passes": [{"moe": settings}]}, "test").preview(small_graph("flux"))


def test_later_passes_are_checked_on_a_sketch_of_the_experts():
    graph = small_graph("pixart")
    rule = {"select": "*.experts.*", "format": "w8a8", "codebook": "uniform"}
    recipe = Recipe.from_dict(
        {"passes": [{"moe": {"experts": 4}}, {"quantize": {"format": "w4a8", "rules": [rule]}}]}, "x"
    )
    plan = recipe.preview(graph)
    assert not any(".experts." in site for site in graph.sites)
    assert "w8a8" in plan["transformer_blocks.0.ff.experts.2.net.2"][-1]
    assert "transformer_blocks.0.ff.router" not in plan


EXPORTED = {"token": "transformer_blocks.0.ff.net.2", "expert": "single_transformer_blocks.0.proj_out"}


def test_an_engine_of_experts_runs_low_bit_and_agrees(checkpoint, statistics, tmp_path):
    recipe = Recipe.from_dict(
        {
            "passes": [
                *({"moe": {"experts": 4, "choice": choice, "samples": 24, "rows": 512, "select": [site]}}
                  for choice, site in EXPORTED.items()),
                {"smooth": {"alpha": 0.5}},
                {"rotate": {"mode": "hadamard"}},
                {"quantize": {"format": "w4a8"}},
            ]
        },
        "test",
    )  # fmt: skip
    result = compile(
        checkpoint, tmp_path / "engine", recipe, CompileOptions(statistics=statistics.folder, progress=False)
    )
    experts = [entry for entry in result.engine.planned if ".experts." in entry.site]
    assert len(experts) == 16 and {entry.kind for entry in experts} == {"integer"}
    parts = result.engine.manifest["structure"]["structural"]
    assert {part["spec"]["choice"] for part in parts if part["kind"] == MixtureOfExperts.kind} == set(EXPORTED)
    assert not prove_fusion(result.engine).not_fused
    inputs = example_inputs(checkpoint)
    torch_form = load_engine(tmp_path / "engine", target="torch")(**inputs, return_dict=False)[0]
    onnx_form = load_engine(tmp_path / "engine", target="onnxruntime-cpu")(**inputs, return_dict=False)[0]
    # ties of rounding may fall either way, as with every quantized engine
    assert float((torch_form - onnx_form).norm() / torch_form.norm()) < 3e-2
    agreement = model_agreement(result.engine, inputs)
    assert agreement.holds, str(agreement)
    means_torch(result.engine, inputs)
    assert max(site_agreement(result.engine, inputs).values()) < 1e-5
    graph = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert all(read & set(node.output) for node in graph.node)  # tokens are not chosen before they are rounded as well
    assert sum(entry.rows is not None for entry in experts) == 8
    found = per_layer_sqnr(checkpoint.load_model(), rebuild(result.engine), [inputs])
    assert found and not any(".experts." in site.site for site in found)  # which the original does not have
