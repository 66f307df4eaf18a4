"""Smoothing, centring and rotation change how the numbers are spread, never what the model computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn import TransformedLinear
from ditq.pass_pipeline import run_passes
from ditq.passes import Context, PassReport
from ditq.passes.rotate import Rotate
from ditq.passes.smooth import Smooth
from ditq.recipe import Recipe
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of

# float32 rounding through a dozen matrix products; the issue of exactness is decided in the float64 run below.
FLOAT32 = 1e-5
FLOAT64 = 1e-12


def _error(reference: torch.Tensor, output: torch.Tensor) -> float:
    return float((reference.double() - output.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", ["smooth", "rotate", "both"])
def test_folds_leave_the_function_unchanged(family: str, steps: str) -> None:
    graph = small_graph(family)
    inputs = small_inputs(graph.model, seed=7)
    reference = forward(graph.model, inputs)
    context = Context(statistics_of(graph))
    passes = {
        "smooth": [Smooth()],
        "rotate": [Rotate(mode="hadamard")],
        "both": [Smooth(alpha=0.7), Rotate(mode="search")],
    }[steps]
    reports = [step.run(graph, context) for step in passes]
    assert all(report.rows for report in reports)
    assert _error(reference, forward(graph.model, inputs)) < FLOAT32


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_are_exact_in_double_precision(family: str) -> None:
    graph = small_graph(family)
    graph.model.double()
    inputs = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in small_inputs(graph.model, seed=7).items()
    }
    statistics = statistics_of(copy.copy(small_graph(family)))
    reference = forward(graph.model, inputs)
    context = Context(statistics)
    Smooth().run(graph, context)
    Rotate(mode="hadamard", online=False).run(graph, context)
    # The folded scale is kept in float32 where PixArt's shared modulation is multiplied; the table and weights are float64.
    limit = 1e-6 if family == "pixart" else FLOAT64
    assert _error(reference, forward(graph.model, inputs)) < limit


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_follow_the_folds(family: str) -> None:
    graph = small_graph(family)
    context = Context(statistics_of(graph))
    Smooth().run(graph, context)
    Rotate(mode="hadamard").run(graph, context)
    group = next(g for g in graph.groups.values() if g.feed is not None)
    module = graph.linear(group.name)
    assert isinstance(module, TransformedLinear)
    rows: list[torch.Tensor] = []
    handle = module.linear.register_forward_pre_hook(lambda _, x: rows.append(x[0].reshape(-1, group.width)))
    for seed in range(3):  # the forwards that the statistics were gathered over
        forward(graph.model, small_inputs(graph.model, seed=seed))
    handle.remove()
    x = torch.cat(rows).double()
    expected = context.statistics(group.name)
    assert _error(x.T @ x / len(x), expected.hessian()) < 1e-4
    assert _error(x.mean(0) + 1, expected.mean() + 1) < 1e-4


def test_smoothing_twice_or_after_rotation_is_refused() -> None:
    from ditq.errors import DitqError

    graph = small_graph("dit")
    context = Context(statistics_of(graph))
    Smooth().run(graph, context)
    with pytest.raises(DitqError, match="smoothed already"):
        Smooth().run(graph, context)


def test_centring_removes_the_mean_of_every_folded_input() -> None:
    graph = small_graph("sd3")
    context = Context(statistics_of(graph))
    Smooth(centre=True).run(graph, context)
    for group in graph.groups.values():
        if group.feed is not None and graph.sites[group.name].role == "token":
            assert context.statistics(group.name).mean().abs().max() < 1e-4


def test_a_fold_that_changes_what_the_model_computes_is_refused() -> None:
    """As one would in a model whose parts were taken for what they are not."""

    @dataclass(frozen=True)
    class Wrong(Smooth):
        def run(self, graph: DiTGraph, context: Context) -> PassReport:
            report = super().run(graph, context)
            graph.model.get_parameter("transformer_blocks.0.norm1.linear.bias").mul_(0.9)
            return report

    graph = small_graph("flux")
    with pytest.raises(DitqError, match="pass 'smooth' changed what the model computes, by 0"):
        run_passes(graph, Recipe("test", "", (Wrong(),)), statistics_of(graph))
