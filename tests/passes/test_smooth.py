"""smooth: what a channel's size is, and the search of its exponents."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.graph import DiTGraph
from ditq.parts import LinearModulation
from ditq.passes import Context
from ditq.passes.salience import channel_sizes, spearman
from ditq.passes.smooth import Smooth
from tests.export.quantized import relative
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, statistics_of


def test_rank_correlation_is_that_of_the_ranks() -> None:
    a, b = torch.tensor([1.0, 5.0, 3.0, 3.0, 100.0]), torch.tensor([2.0, 1.0, 0.5, 4.0, 3.0])
    # ranks 1 4 2.5 2.5 5 and 3 2 1 5 4
    ranks = torch.tensor([[1, 4, 2.5, 2.5, 5], [3, 2, 1, 5, 4]], dtype=torch.float64)
    assert float(spearman(a, b)) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-12)
    assert float(spearman(a, a.exp())) == pytest.approx(1, abs=0.1)
    assert float(spearman(a, -a)) == pytest.approx(-1)
    assert float(spearman(a, torch.ones(5))) == 0


def test_a_channel_that_never_changes_has_a_size_all_the_same() -> None:
    """Its mean square is the square of its mean, up to rounding, which may leave less than nothing."""
    values = torch.linspace(-3, 7, 101)
    constant: Any = SimpleNamespace(channel_rms=values.abs() * (1 - 1e-7), mean=lambda: values)
    found = channel_sizes("rms", constant, values.double(), torch.ones(101).double())
    assert found.isfinite().all() and float(found.max()) < 1e-2


def test_sizes_by_timestep_bin() -> None:
    graph = small_graph("flux")
    statistics = next(iter(statistics_of(graph).groups.values()))
    weights = torch.rand(statistics.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, zero = statistics.mean().double(), torch.zeros(statistics.width).double()
    bins = statistics.sample_bin
    for shift in (mean, zero):
        centred = (statistics.sample.double() - shift).abs()
        parts = torch.stack([centred[bins == number].amax(0) for number in range(statistics.bins)])
        if shift is zero:
            parts = statistics.absmax.double()
        assert torch.equal(channel_sizes("absmax", statistics, shift, weights), parts.amax(0))
        assert torch.equal(channel_sizes("extremes", statistics, shift, weights), torch.maximum(parts[0], parts[-1]))
        eta = torch.stack([(-spearman(part, weights)).exp() for part in parts])
        expected = (eta[:, None] * parts).sum(0) / eta.sum()
        assert torch.allclose(channel_sizes("spearman", statistics, shift, weights), expected, rtol=1e-12)


def test_a_searched_alpha_loses_no_more_than_the_plain_one() -> None:
    graph = small_graph("dit")
    report = Smooth(alpha="search", grid=4, format="w4a4").run(graph, Context(statistics_of(graph)))
    searched = [row for row in report.rows if "alpha" in row]
    assert len(searched) == report.summary["inputs folded"]
    for row in searched:
        plain = (row["alpha"], row["beta"]) == (0.5, 0.5)
        assert plain or row["error best"] < row["error plain"]
        assert 0 <= row["alpha"] < 1 and row["beta"] in (0.0, 1 - row["alpha"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_attention_gives_is_smoothed_whatever_scales_its_values_have(family: str) -> None:
    """Values times t, output columns over t: the same function, with outlying channels that smoothing takes out again."""
    found = []
    for tails in (False, True):
        graph = small_graph(family)
        attention = next(iter(graph.attentions.values()))
        width = attention.heads * attention.head_width
        t = torch.ones(width)
        if tails:
            t[::7] = 40.0
        for site in attention.values:
            linear = graph.linear(site)
            linear.weight.data *= t[:, None]
            linear.bias.data *= t
        for output in attention.outputs:
            graph.linear(output.site).weight.data[:, output.start : output.stop] /= t
        context = Context(statistics_of(graph))
        rows = {row["group"]: row for row in Smooth().run(graph, context).rows}
        output = attention.outputs[0]
        group = graph.sites[output.site].group
        if tails:
            assert rows[group]["spread before"] > 20 > rows[group]["spread after"]
        sizes = context.statistics(group).absmax_all[output.start : output.stop]
        found.append(sizes / sizes.mean())  # scales have a geometric mean of 1, so only ratios are equal
        assert (
            context.statistics(group).mean()[output.start : output.stop].abs().max() < 1e-3
            or len(attention.outputs) > 1
        )
    assert torch.allclose(found[0], found[1], rtol=1e-3)


def test_a_channel_that_calibration_saw_at_one_value_only_is_centred_and_not_scaled() -> None:
    graph, channel = small_graph("flux"), 5
    group = next(group for group in graph.groups.values() if isinstance(group.feed, LinearModulation))
    modulation = graph.linear(group.feed.site)
    for row, value in ((group.feed.scale + channel, -1.0), (group.feed.shift + channel, -5.75)):
        modulation.weight.data[row], modulation.bias.data[row] = 0, value
    context = Context(statistics_of(graph))
    inputs = small_inputs(graph.model)
    before = forward(graph.model, inputs)
    Smooth().run(graph, context)
    scale = context.change(group.name).inverse_scale
    assert scale is not None and float(scale[channel]) == 1 and abs(float(scale.log().mean())) < 1e-6
    assert torch.allclose(forward(graph.model, inputs), before, rtol=1e-4, atol=1e-4)
    assert float(context.statistics(group.name).hessian()[channel].abs().max()) < 1e-6


def test_values_are_left_alone_where_the_recipe_says_so() -> None:
    graph = small_graph("flux")
    context = Context(statistics_of(graph))
    report = Smooth(values=False).run(graph, context)
    outputs = {
        graph.sites[output.site].group for attention in graph.attentions.values() for output in attention.outputs
    }
    assert report.summary["attentions folded"] == 0 and not outputs & {row["group"] for row in report.rows}


class SideBySide(nn.Module):
    """One norm, two attentions whose answers lie beside each other in one output linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.w = (nn.Linear(32, 32) for _ in range(4))
        self.out = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, *values = (
            linear(h).unflatten(-1, (2, 16)).transpose(1, 2) for linear in (self.q, self.k, self.v, self.w)
        )
        answers = [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) for v in values]
        return x + self.out(torch.cat(answers, -1))


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([SideBySide(), SideBySide()])

    def forward(self, hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


def test_attentions_side_by_side_in_one_output_are_both_smoothed() -> None:
    torch.manual_seed(0)
    model, x = TwoAttentions().eval().requires_grad_(False), torch.randn(2, 16, 32)
    graph, expected = DiTGraph(model, {"hidden_states": x}), model(x)[0]
    context = Context(statistics_of(graph, inputs=[{"hidden_states": x}]))
    out = graph.groups[graph.sites["blocks.0.out"].group].name
    rows = [row for row in Smooth().run(graph, context).rows if row["group"] == out]
    assert relative(model(x)[0], expected) < 1e-5
    inverse = context.change(out).inverse_scale
    assert inverse is not None and bool((inverse != 1).all())  # of the channels of both
    for row, part in zip(rows, (slice(0, 32), slice(32, 64)), strict=True):
        absmax = context.statistics(out).absmax_all[part]
        assert row["spread after"] == pytest.approx(float(absmax.max() / absmax.median()))
    seen: list[Tensor] = []
    model.get_submodule("blocks.0.out").register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    model(x)
    assert torch.allclose(context.statistics(out).absmax_all, seen[0].abs().amax(0), rtol=1e-3, atol=1e-5)
