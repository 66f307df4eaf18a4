"""rotate and what judges it: the judge says what `quantize` does, noise is no gain, learned rotations leave the function."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditq.cost_model import costs_before
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.passes import Context
from ditq.passes.folding import plain_linear
from ditq.passes.judging import Judge, Trial, choose
from ditq.passes.quantize import Quantize
from ditq.passes.rotate import Rotate, online_cost
from ditq.passes.smooth import Smooth
from ditq.recipe import Recipe
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of

LEARNED = {"mode": "learned", "heads": "learned", "kinds": ["block_hadamard"], "steps": 3, "format": "w4a4"}


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("format", ["w4a8", "w3a6", "w8a8"])
def test_the_judge_says_what_the_quantized_layer_does(format: str, rounding: str) -> None:
    graph = small_graph("dit")
    context = Context(statistics_of(graph))
    Smooth().run(graph, context)
    group = next(group for group in graph.groups.values() if group.feed and graph.sites[group.name].role == "token")
    statistics = context.statistics(group.name)
    weights = {site: plain_linear(graph, site).weight.detach().clone() for site in group.sites}
    site, weight = next(iter(weights.items()))
    judged = Judge(format, "twin_log_shared", rounding).errors(trial := Trial.of(statistics, [weight]), trial.output())
    bias = plain_linear(graph, site).bias
    reference = torch.nn.functional.linear(statistics.sample, weight, bias)
    Quantize(format=format, rounding=rounding, select=[site]).run(graph, context)
    layer = graph.linear(site)
    assert isinstance(layer, QuantLinear)
    lost = (layer(statistics.sample) - reference).double().square().sum()
    relative = float(lost / (statistics.sample @ weight.T).double().square().sum())
    # a weight right between two levels may round the other way, float32 against float64 moments
    assert float(judged.mean()) == pytest.approx(relative, rel=0.02)


def test_a_trial_in_another_basis_has_the_statistics_of_that_basis() -> None:
    graph = small_graph("sd3")
    statistics = statistics_of(graph)
    context = Context(statistics)
    group = next(group for group in graph.groups.values() if group.feed and graph.sites[group.name].role == "token")
    before = Trial.of(context.statistics(group.name), [plain_linear(graph, site).weight for site in group.sites])
    Smooth(alpha=0.7, values=False).run(graph, context)
    Rotate(mode="hadamard", values=False).run(graph, context)
    change = context.change(group.name)
    assert change.inverse_scale is not None and change.shift is not None
    moved = before.scaled(change.inverse_scale, change.shift).rotated(change.rotations[0][2])
    after = Trial.of(context.statistics(group.name), [plain_linear(graph, site).weight for site in group.sites])
    for name in ("rows", "weight", "moment", "mean"):
        a, b = getattr(moved, name).double(), getattr(after, name).double()
        assert float((a - b).norm()) < 1e-5 * float(before.rows.norm()), name
    assert torch.allclose(moved.output(), before.output(), rtol=1e-4, atol=1e-4)


def test_noise_is_no_gain() -> None:
    rows = _normal(400).square().double()
    noise = 0.5 * _normal(400, seed=1).double()
    assert choose({"cheap": rows, "dear": rows - 0.02}, 0.05) == "cheap"  # surely better, but by too little
    assert choose({"cheap": rows, "dear": rows - 0.02}, 0.0) == "dear"
    assert choose({"cheap": rows, "dear": rows + noise - noise.mean() - 0.02}, 0.0) == "cheap"  # within its noise
    assert choose({"cheap": rows, "dear": rows + noise - noise.mean() - 0.2}, 0.05) == "dear"


def test_search_rotates_where_a_channel_sticks_out_and_only_there() -> None:
    rows, weight = _normal(2048, 64), _normal(48, 64, seed=1)
    search = Rotate(mode="search", format="w8a4", kinds=["hadamard", "identity"])
    trials = []
    for peak, wanted in ((1.0, "identity"), (100.0, "hadamard")):
        x, w = rows.clone(), weight.clone()
        x[:, 3] *= peak
        w[:, 3] /= peak
        moment = x.T.double() @ x.double() / len(x)
        trials.append(Trial(x, w, moment, x.double().mean(0), torch.zeros(48)))
        kind, rotation, errors = search._search(trials[-1:], 0)
        assert (kind, rotation is None) == (wanted, wanted == "identity"), errors
    for order in (trials, trials[::-1]):  # inputs that are rotated alike: what all of them lose together
        kind, _, errors = search._search(order, 0)
        assert kind == "hadamard" and errors["identity"] > errors["hadamard"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_rotations_leave_the_function_unchanged_and_cost_what_their_start_does(family: str) -> None:
    graph = small_graph(family)
    inputs = small_inputs(graph.model, seed=7)
    reference = forward(graph.model, inputs)
    step = Rotate(**LEARNED)
    expected = step.runtime_cost(graph)
    report = step.run(graph, Context(statistics_of(graph)))
    assert expected == (online_cost(graph), online_cost(graph))
    macs = costs_before(graph).macs.values()  # what `ditq inspect` divides by
    assert report.summary["online cost, % of multiply-adds"] == pytest.approx(100 * expected[0] / sum(macs), rel=1e-9)
    assert any(row["kind"] == "learned" for row in report.rows)
    offline = [row for row in report.rows if row["kind"].startswith("offline")]
    assert offline and all(row["error learned"] > 0 for row in offline)
    for row in offline:  # what was learned is taken where it is better
        assert row["error learned"] < row["error hadamard"] or row["kind"] == "offline", row
    output = forward(graph.model, inputs)
    assert float((output - reference).norm()) < 1e-5 * float(reference.norm())


def test_the_cost_told_beforehand_is_the_cost() -> None:
    for settings in ({"mode": "hadamard"}, {"mode": "block_hadamard", "block": 32}, {"mode": "regular"},
                     {"mode": "outlier"}, {"mode": "identity"}, {"mode": "hadamard", "values": False}):  # fmt: skip
        graph = small_graph("flux")
        step = Rotate(**settings)
        cost = step.runtime_cost(graph)
        step.run(graph, Context(statistics_of(graph)))
        assert cost == (online_cost(graph), online_cost(graph)), settings
    least, most = Rotate(mode="search").runtime_cost(small_graph("flux"))
    assert least == 0 < most


def test_a_width_without_the_kind_is_refused_before_calibration() -> None:
    with pytest.raises(DitqError, match=r"pass 'rotate': a.b: .*50.*choose another mode"):
        Rotate(mode="hadamard")._possible(50, "a.b")
    assert list(Rotate(mode="search")._possible(50, "a.b")) == ["identity", "block_hadamard"]
    assert list(Rotate(mode="search")._possible(51, "a.b")) == ["identity"]


@pytest.mark.parametrize("heads", ["hadamard", "learned"])
@pytest.mark.parametrize(("width", "offline"), [(18, True), (9, False)])
def test_heads_of_any_width_are_rotated_or_left_exactly(width: int, offline: bool, heads: str) -> None:
    """18 channels in blocks of 2; 9 have no Hadamard block, and their attention's outputs are rotated online as the others."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=36 // width, attention_head_dim=width, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().requires_grad_(False)
    inputs = small_inputs(model)
    graph = DiTGraph(model, inputs)
    reference, statistics = forward(model, inputs), statistics_of(graph)
    (attention,) = graph.attentions.values()
    step = Rotate(mode="search", kinds=["identity"], heads=heads, steps=2)
    said = step.preview(graph)
    assert [said[output.site] == "rotate offline" for output in attention.outputs] == [offline]
    with torch.no_grad():
        report = step.run(graph, Context(statistics))
    assert any(row["kind"].startswith("offline") for row in report.rows) == offline
    assert float((forward(graph.model, inputs) - reference).norm()) < 1e-5 * float(reference.norm())


def test_what_is_rotated_is_not_rotated_again() -> None:
    """The second one's matrix of the heads would stand behind the online rotation of the first."""
    graph = small_graph("pixart")
    first, second = {"mode": "hadamard", "values": False}, {"mode": "hadamard"}
    recipe = Recipe.from_dict({"passes": [{"rotate": first}, {"rotate": second}]}, "test")
    with pytest.raises(DitqError, match="pass 'rotate' cannot follow 'rotate'"):
        recipe.preview(graph)
    context = Context(statistics_of(graph))
    Rotate(**first).run(graph, context)
    with pytest.raises(DitqError, match="rotated online already"):
        Rotate(**second).run(graph, context)
