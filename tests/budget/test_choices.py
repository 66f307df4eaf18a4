"""What the names of candidates make of the linears: bits, groups of columns, branches; names that mean one layer are one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ditq.budget.choices import Choices, make_choices
from ditq.budget.fit import _rules
from ditq.budget.front import Point
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.passes import Context
from ditq.passes.quantize import Quantize
from ditq.recipe import Recipe
from tests.families_small import small_graph

ONE = "transformer_blocks.0.attn1.to_q"


def choices_of(graph: DiTGraph, step: Quantize, *names: str) -> Choices:
    with torch.no_grad():
        return make_choices(graph, step, Context(), names)


@pytest.fixture(scope="module")
def graph() -> DiTGraph:
    return small_graph("dit")


@pytest.fixture(scope="module")
def step() -> Quantize:
    plain = {
        "format": "w4a16",
        "codebook": "uniform",
        "rounding": "nearest",
        "weighted": False,
        "bias_correction": False,
    }
    return Quantize(**plain, rules=[{"select": "role:modulation", "group_size": 32}])  # type: ignore[arg-type]


def layer(choices: Choices, site: str, name: str) -> QuantLinear:
    found = choices.layers[choices.sites.index(site)][choices.names.index(name)]
    assert isinstance(found, QuantLinear)
    return found


def test_groups_and_branches_are_those_of_the_name_and_else_the_recipes(graph: DiTGraph, step: Quantize) -> None:
    choices = choices_of(graph, step, "w3", "w3g16", "w3g16r2")
    assert layer(choices, ONE, "w3").scale.shape[-1] != 4 and layer(choices, ONE, "w3").bits == 3
    grouped, both = layer(choices, ONE, "w3g16"), layer(choices, ONE, "w3g16r2")
    assert grouped.multiplier is None and grouped.scale.shape == both.scale.shape == (
        grouped.out_features,
        4,
    )  # of 64 inputs
    assert grouped.rank == 0 and both.rank == 2
    row = choices.sites.index(ONE)
    assert choices.bits[row, 0] < choices.bits[row, 1] < choices.bits[row, 2]


def test_names_of_one_layer_are_one_candidate_and_called_by_the_first(graph: DiTGraph, step: Quantize) -> None:
    choices = choices_of(graph, step, "w4", "w4g32")
    modulation = next(site for site in choices.sites if graph.sites[site].role == "modulation")
    assert layer(choices, modulation, "w4") is layer(choices, modulation, "w4g32")  # the rule's groups are 32 already
    assert layer(choices, ONE, "w4") is not layer(choices, ONE, "w4g32")
    labels = choices.labels(choices.by_first_names(np.ones(len(choices.sites), dtype=np.int64)))
    assert labels[modulation] == "w4" and labels[ONE] == "w4g32"
    rules = _rules(graph, step, labels)
    assert [rule for rule in rules if rule.get("group_size") != 32] == []
    assert {site for rule in rules for site in rule["select"]} == {site for site in labels if labels[site] == "w4g32"}


def test_a_chosen_rank_is_what_the_written_rules_mean_where_the_recipe_has_a_share(graph: DiTGraph) -> None:
    plain = {"codebook": "uniform", "rounding": "nearest", "weighted": False, "bias_correction": False}
    step = Quantize(format="w4a16", rank_share=0.02, branch="float", **plain)  # type: ignore[arg-type]
    rules = _rules(graph, step, {ONE: "w4r8"})
    fitted = replace(step, rules=rules)
    fitted.check()
    assert fitted.plan(graph)[ONE].rank == 8 != step.plan(graph)[ONE].rank
    recipe = Recipe("r", "", (fitted,))
    assert Recipe.from_dict(recipe.to_json(), "r").passes == recipe.passes


def test_groups_that_do_not_divide_are_refused_before_any_work(graph: DiTGraph, step: Quantize) -> None:
    with pytest.raises(DitqError, match=r"candidate w4g48: \S+: groups of 48 do not divide its \d+ inputs") as error:
        choices_of(graph, step, "w4", "w4g48")
    assert "\n" not in str(error.value)


def test_candidates_are_checked_as_settings_are_before_any_work(graph: DiTGraph, step: Quantize) -> None:
    with pytest.raises(DitqError, match=r"^budget: candidate w4r999: \S+: a rank of 999 is above its width, \d+$"):
        choices_of(graph, step, "w4", "w4r999")
    floats = replace(step, format="w4a8", carrier="float8_e4m3", codebook="twin_log_shared")
    with pytest.raises(DitqError, match=r"^budget: candidate w4r8: a branch of int8 rows cannot read"):
        choices_of(graph, floats, "w4", "w4r8")


def test_a_row_of_the_front_counts_linears_without_a_choice_apart() -> None:
    one, other, ruled = (nn.Linear(2, 2) for _ in range(3))
    sizes = np.ones((3, 2), dtype=np.int64)
    choices = Choices(
        ("a", "b", "c"), ("w2", "w4"), ((one, other), (one, other), (ruled, ruled)), sizes[:, 0], sizes, sizes, 0,
        frozenset({"c"}),
    )  # fmt: skip
    row = Point(np.array([0, 1, 0]), 3, 1.0, 0.0, 0.0).row(choices)
    assert row["linears"] == "1 w2, 1 w4, 1 as the recipe has it"
    assert row["predicted error, dB"] is None and row["measured error, dB"] is None  # no error has no logarithm
