"""slim_modulation: what the calibration moves is kept with few directions, measured against brute force, in every family."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditq.calibration.calibrate import calibrate
from ditq.calibration.statistics import Statistics
from ditq.calibration.step_weights import StepWeights
from ditq.checkpoint import Checkpoint
from ditq.cost_model import costs_after, costs_before
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn.rebuild import describe, rebuild
from ditq.nn.structural.low_rank_linear import LowRankLinear
from ditq.numerics.principal_outputs import principal_outputs, rank_for
from ditq.passes import Context
from ditq.passes import slim_modulation as module
from ditq.passes.quantize import Quantize
from ditq.passes.slim_modulation import SlimModulation
from ditq.recipe import Recipe
from tests.calibration.small_pipelines import ARGUMENTS
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model, statistics_of


def test_the_directions_are_those_of_a_singular_value_decomposition() -> None:
    """The error of each rank is the tail of the exact decomposition of W C^(1/2), which no other matrix of that rank beats."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    rows = torch.randn(100, 8, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 8)
    covariance = torch.cov(rows.T)
    directions, energies = principal_outputs(weight, covariance)
    exact = torch.linalg.svdvals(weight @ torch.linalg.cholesky(covariance)).square()
    torch.testing.assert_close(energies, exact, rtol=1e-9, atol=1e-12 * float(exact[0]))
    torch.testing.assert_close(directions.T @ directions, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    for rank in (1, 3, 7):
        up = directions[:, :rank]
        left = weight - up @ (up.T @ weight)
        lost = torch.trace(left @ covariance @ left.T)
        torch.testing.assert_close(lost, exact[rank:].sum(), rtol=1e-6, atol=0)
    assert rank_for(torch.tensor([8.0, 1.0, 1.0]), 0.85) == 2 and rank_for(torch.tensor([8.0, 1.0, 1.0]), 0.8) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_calibration_saw_is_kept(family: str) -> None:
    """Few forwards span few directions, so that a rank of 16 holds all of them: the same answers, from fewer weights."""
    graph = small_graph(family)
    inputs = [small_inputs(graph.model, seed=seed) for seed in range(3)]
    statistics = statistics_of(graph, inputs=inputs)
    before = [forward(graph.model, given) for given in inputs]
    roles = [site.name for site in graph.sites.values() if site.role == "modulation"]
    report = SlimModulation(keep=1 - 1e-7, multiple=16).run(graph, Context(statistics))
    assert [row["site"] for row in report.rows] == roles
    assert report.summary["weights after"] < 0.6 * report.summary["weights before"]
    for given, wanted in zip(inputs, before, strict=True):
        found = forward(graph.model, given)
        # What is dropped has at most 1e-7 of the variance, 3e-4 in amplitude; ten times that for what the network makes of it.
        assert float((found - wanted).norm() / wanted.norm()) < 3e-3
    halves = [f"{name}.{half}" for name in roles for half in ("down", "up")]
    assert [site.name for site in graph.sites.values() if site.role == "modulation"] == halves


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_quantized_like_other_modulation_and_loaded_again(family: str) -> None:
    graph = small_graph(family)
    context = Context(statistics_of(graph))
    SlimModulation(rank=16, multiple=16).run(graph, context)
    context.restructured(statistics_of(graph))
    Quantize(format="w8a16", select=["role:modulation"]).run(graph, context)
    fresh = small_model(family, seed=1)
    rebuild(fresh, describe(graph.model), copy.deepcopy(graph.model.state_dict()))
    inputs = small_inputs(graph.model, seed=5)
    assert torch.equal(forward(fresh, inputs), forward(graph.model, inputs))
    parts = [module for module in fresh.modules() if isinstance(module, LowRankLinear)]
    assert parts and all(type(part.up).__name__ == "QuantLinear" for part in parts)


def test_steps_weigh_what_they_did_when_statistics_are_gathered_again() -> None:
    graph = small_graph("flux")
    first = statistics_of(graph)
    context = Context(replace(first, step_weights=StepWeights(effect=(1.0, 2.0), share=(1.5, 0.5))))
    before = context.bin_weights("effect")
    context.restructured(statistics_of(graph))
    assert before is not None and torch.equal(context.bin_weights("effect"), before)


def test_a_linear_that_would_not_become_smaller_stays() -> None:
    """64 x 384 in two factors is smaller up to a rank of 54; ranks of 64 are not."""
    graph = small_graph("dit")
    before = {name: tensor.clone() for name, tensor in graph.model.state_dict().items()}
    report = SlimModulation(rank=5, multiple=64).run(graph, Context(statistics_of(graph)))
    assert all(row["rank"] is None for row in report.rows)
    assert report.summary["weights after"] == report.summary["weights before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.model.state_dict().items())


@pytest.mark.parametrize("settings", [{"rank": 16, "multiple": 16}, {"keep": 0.99, "multiple": 16}])
def test_a_linear_of_zeros_loses_nothing(settings: dict[str, Any]) -> None:
    """As adaLN-Zero begins."""
    graph = small_graph("dit")
    site = graph.select(["role:modulation"])[0]
    graph.linear(site).weight.data.zero_()
    report = SlimModulation(**settings).run(graph, Context(statistics_of(graph)))
    row = next(row for row in report.rows if row["site"] == site)
    assert row["rank"] == 16 and row["variance lost"] == 0
    json.dumps(report.to_json(), allow_nan=False)


def test_a_linear_whose_input_never_varied_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of one step and one time: how it varies elsewhere is not known."""
    graph = small_graph("dit")
    width = graph.sites[graph.select(["role:modulation"])[0]].in_features
    constant = torch.ones(width, dtype=torch.float64), torch.full((width, width), 1e-17, dtype=torch.float64)
    monkeypatch.setattr(module, "_moments", lambda _, __, sites, ___: dict.fromkeys(sites, constant))
    report = SlimModulation(rank=16, multiple=16).run(graph, Context(statistics_of(graph)))
    assert all(row["rank"] is None for row in report.rows)


def test_rules_behind_it_are_checked_on_what_it_leaves() -> None:
    graph = small_graph("dit")
    site = graph.select(["role:modulation"])[0]
    for settings in ({"rank": 16, "multiple": 16}, {"keep": 0.999, "multiple": 16}):
        rule = {"select": f"{site}.up", "format": "w8a16"}
        recipe = Recipe.from_dict({"passes": [{"slim_modulation": settings}, {"quantize": {"rules": [rule]}}]}, "test")
        recipe.preview(graph)
        stages = list(recipe.stages(DiTGraph(copy.deepcopy(graph.model), graph.example_inputs)))
        step, found = stages[-1]
        assert isinstance(step, Quantize) and step.plan(found)[f"{site}.up"].format == "w8a16"


def test_its_cost_is_told_before_anything_is_done() -> None:
    """Of 2 x 6 D^2 weights, 2 x r 7 D are left."""
    graph, d, rank = small_graph("dit"), 64, 16
    recipe = Recipe("test", "", (SlimModulation(rank=rank, multiple=16),))
    before, after = costs_before(graph), costs_after(graph, recipe)
    assert before.macs["modulation"] - after.macs["modulation"] == 2 * (6 * d * d - rank * 7 * d)
    slim = DiTGraph(copy.deepcopy(graph.model), graph.example_inputs)
    recipe.passes[0].run(slim, Context(statistics_of(slim)))
    assert after.parameters == costs_before(slim).parameters
    assert after.macs == costs_before(slim).macs


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"keep": 0.0}, "keep is 0"), ({"rank": -1}, "rank must be"), ({"select": ["role:token"]}, "is no modulation")],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(DitqError, match=said):
        Recipe.from_dict({"passes": [{"slim_modulation": settings}]}, "test").preview(small_graph("dit"))


def graph_again() -> DiTGraph:
    checkpoint = Checkpoint.open("mini")
    return DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))


def test_directions_are_those_of_further_conditions_too(tmp_path: Path) -> None:
    """Of four prompts two are drawn; what is lost on all four is less where the other two were read as well."""
    prompts = ["red apple, fluent 3d", "dog, noto", "castle, twemoji", "whale, fluent 3d"]
    arguments = {**ARGUMENTS["flux"], "num_inference_steps": 2}

    def made(name: str, **settings: Any) -> Statistics:
        return calibrate(
            "mini", tmp_path / name, prompts, bins=1, rows_per_bin=4, arguments=arguments, progress=False, **settings
        )

    truth, lost = made("all"), {}
    for name, count in (("few", 0), ("further", 4)):
        graph = graph_again()
        site = "single_transformer_blocks.0.norm.linear"
        seen = truth.groups[graph.sites[site].group]
        covariance = seen.hessian().double() - torch.outer(seen.mean().double(), seen.mean().double())
        weight = graph.linear(site).weight.double()
        statistics = made(name, limit=2, modulation_conditions=count)
        SlimModulation(rank=4, multiple=4, select=[site]).run(graph, Context(statistics))
        part = graph.model.get_submodule(site)
        left = weight - part.up.weight.double() @ part.down.weight.double()
        lost[name] = float(torch.trace(left @ covariance @ left.T) / torch.trace(weight @ covariance @ weight.T))
    (tmp_path / "further" / "trajectories" / "further.safetensors").unlink()
    with pytest.raises(DitqError, match="are gone from the trajectories; make them anew with ditq calibrate --resume"):
        SlimModulation(rank=4, multiple=4, select=[site]).run(graph_again(), Context(statistics))
    assert lost["further"] < 0.5 * lost["few"]


def test_the_rank_that_is_shown_is_the_one_that_is_taken() -> None:
    graph = small_graph("dit")
    site = next(iter(SlimModulation().preview(graph)))
    assert set(SlimModulation(keep=0.9).preview(graph).values()) == {"rank for 0.9"}
    assert SlimModulation(rank=3, multiple=4).preview(graph)[site] == "rank 4"
    assert SlimModulation(rank=9999, multiple=1).preview(graph)[site] == "as it is: rank 9999 is no smaller"
