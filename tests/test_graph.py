"""What the graph finds in each family, stated here one by one; and that names of classes and attributes decide nothing."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from ditq.errors import DitqError
from ditq.families import family_of
from ditq.graph import DiTGraph
from ditq.parts import ChannelRange, LinearModulation, TableModulation
from ditq.passes import Context
from ditq.passes.rotate import Rotate
from ditq.passes.smooth import Smooth
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model, statistics_of

WIDTH = 64  # of every small model: 2 heads of 32


def _roles(graph: DiTGraph, role: str) -> list[str]:
    return [site.name for site in graph.sites.values() if site.role == role]


def _kinds(graph: DiTGraph, block: str) -> dict[str, str]:
    return {s.name.removeprefix(f"{block}."): s.kind for s in graph.sites.values() if s.block == block and s.kind}


def _groups(graph: DiTGraph, block: str) -> list[set[str]]:
    """Linears of a block that read one tensor, where there are several."""
    found = [group.sites for group in graph.groups.values() if graph.sites[group.name].block == block]
    return [{name.removeprefix(f"{block}.") for name in sites} for sites in found if len(sites) > 1]


def test_flux_double_block() -> None:
    graph, block = small_graph("flux"), "transformer_blocks.0"
    stacks = ("transformer_blocks", "single_transformer_blocks")
    assert list(graph.blocks) == [f"{stack}.{i}" for stack in stacks for i in (0, 1)]
    assert _kinds(graph, block) == {
        "attn.to_q": "query", "attn.to_k": "key", "attn.to_v": "value", "attn.to_out.0": "attention_out",
        "attn.add_q_proj": "query", "attn.add_k_proj": "key", "attn.add_v_proj": "value", "attn.to_add_out": "attention_out",
        "ff.net.0.proj": "feed_forward_in", "ff.net.2": "feed_forward_out",
        "ff_context.net.0.proj": "feed_forward_in", "ff_context.net.2": "feed_forward_out",
    }  # fmt: skip
    assert _groups(graph, block) == [
        {"attn.to_q", "attn.to_k", "attn.to_v"}, {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}
    ]  # fmt: skip
    # norm1's linear gives shift, scale, gate of the attention, then shift, scale, gate of the MLP: six times the width.
    norm1, context = f"{block}.norm1.linear", f"{block}.norm1_context.linear"
    feeds = {group.name.removeprefix(f"{block}."): group.feed for group in graph.groups.values()}
    assert feeds["attn.to_q"] == LinearModulation(norm1, 0, WIDTH)
    assert feeds["ff.net.0.proj"] == LinearModulation(norm1, 3 * WIDTH, 4 * WIDTH)
    assert feeds["attn.add_q_proj"] == LinearModulation(context, 0, WIDTH)
    assert feeds["ff_context.net.0.proj"] == LinearModulation(context, 3 * WIDTH, 4 * WIDTH)
    assert feeds["ff.net.2"] is None and feeds["attn.to_out.0"] is None


def test_flux_single_block_joins_attention_and_mlp_in_one_output() -> None:
    graph, block = small_graph("flux"), "single_transformer_blocks.1"
    assert _kinds(graph, block) == {
        "attn.to_q": "query", "attn.to_k": "key", "attn.to_v": "value", "proj_mlp": "feed_forward_in",
        "proj_out": "attention_out+feed_forward_out",
    }  # fmt: skip
    assert _groups(graph, block) == [{"proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"}]
    group = graph.groups[graph.sites[f"{block}.attn.to_q"].group]
    assert group.feed == LinearModulation(f"{block}.norm.linear", 0, WIDTH)
    attention = next(a for a in graph.attentions.values() if f"{block}.attn.to_v" in a.values)
    assert attention.outputs == (ChannelRange(f"{block}.proj_out", 0, WIDTH),)
    assert graph.feed_forwards[f"{block}.proj_out"].output == ChannelRange(f"{block}.proj_out", WIDTH, 5 * WIDTH)


def test_flux_roles_outside_the_blocks() -> None:
    graph = small_graph("flux")
    assert _roles(graph, "embedder") == [
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2",
        "context_embedder", "x_embedder",
    ]  # fmt: skip
    assert _roles(graph, "final") == ["norm_out.linear", "proj_out"]
    assert graph.groups["proj_out"].feed == LinearModulation("norm_out.linear", WIDTH, 0)  # scale comes before shift
    assert _roles(graph, "modulation") == [
        *(f"transformer_blocks.{i}.{norm}.linear" for i in (0, 1) for norm in ("norm1", "norm1_context")),
        "single_transformer_blocks.0.norm.linear", "single_transformer_blocks.1.norm.linear",
    ]  # fmt: skip


def test_sd3_joint_blocks_with_a_second_attention_and_a_context_that_ends() -> None:
    graph = small_graph("sd3")
    first, last = "transformer_blocks.0", "transformer_blocks.1"
    assert list(graph.blocks) == [first, last]
    # The first block attends twice: norm1 gives nine pieces, and the same input in two modulations.
    assert {f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")} <= set(_kinds(graph, first))
    feeds = {name: group.feed for name, group in graph.groups.items()}
    norm1 = f"{first}.norm1.linear"
    assert graph.sites[norm1].out_features == 9 * WIDTH
    assert feeds[f"{first}.attn.to_q"] == LinearModulation(norm1, 0, WIDTH)
    assert feeds[f"{first}.attn2.to_q"] == LinearModulation(norm1, 6 * WIDTH, 7 * WIDTH)
    # The last block makes no context: its text stream ends in the attention, scale before shift in its norm.
    assert f"{last}.attn.to_add_out" not in graph.sites and f"{last}.ff_context.net.2" not in graph.sites
    assert feeds[f"{last}.attn.add_q_proj"] == LinearModulation(f"{last}.norm1_context.linear", WIDTH, 0)
    assert _roles(graph, "final") == ["norm_out.linear", "proj_out"]
    assert all(attention.foldable for attention in graph.attentions.values() if ".attn2" in attention.name)


def test_pixart_shares_one_modulation_and_keeps_a_table_a_block() -> None:
    graph, block = small_graph("pixart"), "transformer_blocks.1"
    assert _kinds(graph, block) == {
        "attn1.to_q": "query", "attn1.to_k": "key", "attn1.to_v": "value", "attn1.to_out.0": "attention_out",
        "attn2.to_q": "query", "attn2.to_k": "key", "attn2.to_v": "value", "attn2.to_out.0": "attention_out",
        "ff.net.0.proj": "feed_forward_in", "ff.net.2": "feed_forward_out",
    }  # fmt: skip
    feeds = {name: group.feed for name, group in graph.groups.items()}
    table = f"{block}.scale_shift_table"
    assert feeds[f"{block}.attn1.to_q"] == TableModulation(table, 0, 1, block, "timestep")
    assert feeds[f"{block}.ff.net.0.proj"] == TableModulation(table, 3, 4, block, "timestep")
    # Cross attention reads the stream itself, and all blocks' keys and values read the text: nothing to fold into.
    assert feeds[f"{block}.attn2.to_q"] is None
    text = graph.groups[graph.sites[f"{block}.attn2.to_k"].group]
    assert text.sites == tuple(f"transformer_blocks.{i}.attn2.{name}" for i in (0, 1) for name in ("to_k", "to_v"))
    assert text.feed is None
    assert _roles(graph, "modulation") == ["adaln_single.linear"]
    assert {"caption_projection.linear_1", "caption_projection.linear_2"} <= set(_roles(graph, "embedder"))


def test_dit_has_an_embedder_and_a_modulation_in_every_block() -> None:
    graph, block = small_graph("dit"), "transformer_blocks.0"
    assert _kinds(graph, block) == {
        "attn1.to_q": "query", "attn1.to_k": "key", "attn1.to_v": "value", "attn1.to_out.0": "attention_out",
        "ff.net.0.proj": "feed_forward_in", "ff.net.2": "feed_forward_out",
    }  # fmt: skip
    assert _roles(graph, "modulation") == [f"transformer_blocks.{i}.norm1.linear" for i in (0, 1)]
    assert f"{block}.norm1.emb.timestep_embedder.linear_1" in _roles(graph, "embedder")
    assert _roles(graph, "final") == ["proj_out_1", "proj_out_2"]
    assert graph.groups["proj_out_2"].feed == LinearModulation("proj_out_1", 0, WIDTH)
    feeds = {name: group.feed for name, group in graph.groups.items()}
    assert feeds[f"{block}.attn1.to_q"] == LinearModulation(f"{block}.norm1.linear", 0, WIDTH)
    assert feeds[f"{block}.ff.net.0.proj"] == LinearModulation(f"{block}.norm1.linear", 3 * WIDTH, 4 * WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_has_a_place(family: str) -> None:
    graph = small_graph(family)
    linears = {name for name, module in graph.model.named_modules() if isinstance(module, nn.Linear)}
    assert set(graph.sites) == linears
    assert {site.role for site in graph.sites.values()} <= {"token", "modulation", "embedder", "final"}
    in_groups = [name for group in graph.groups.values() for name in group.sites]
    assert sorted(in_groups) == sorted(linears)
    assert all(site.kind for site in graph.sites.values() if site.role == "token")
    for attention in graph.attentions.values():
        assert (attention.heads, attention.head_width) == (2, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_a_group_read_one_and_the_same_tensor(family: str) -> None:
    graph = small_graph(family)
    read: dict[str, torch.Tensor] = {}
    for name in graph.sites:
        graph.linear(name).register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    forward(graph.model, small_inputs(graph.model, seed=3))
    for group in graph.groups.values():
        assert all(torch.equal(read[name], read[group.name]) for name in group.sites)
    firsts = [read[name] for name in graph.groups if graph.sites[name].role == "token"]
    for i, one in enumerate(firsts):
        assert not any(one.shape == other.shape and torch.equal(one, other) for other in firsts[:i])


def test_multiply_adds_of_one_sample_by_hand() -> None:
    graph = small_graph("flux")  # 8x8 image tokens, 16 text tokens, width 64, MLP 256
    macs = {name: site.macs for name, site in graph.sites.items()}
    assert macs["transformer_blocks.0.attn.to_q"] == 64 * 64 * 64
    assert macs["transformer_blocks.0.attn.add_q_proj"] == 16 * 64 * 64
    assert macs["transformer_blocks.0.ff.net.0.proj"] == 64 * 64 * 256
    assert macs["single_transformer_blocks.0.proj_out"] == 80 * 320 * 64
    assert macs["transformer_blocks.0.norm1.linear"] == 1 * 64 * 384
    attention = next(a for a in graph.attentions.values() if "transformer_blocks.0.attn.to_v" in a.values)
    assert (
        attention.macs == 2 * 2 * 80 * 80 * 32
    )  # scores and their product with the values, two heads of 32, 80 tokens


def test_multiply_adds_do_not_depend_on_the_example_batch() -> None:
    model = small_model("dit")
    one, four = (DiTGraph(model, small_inputs(model, batch=batch)) for batch in (1, 4))
    assert {n: s.macs for n, s in one.sites.items()} == {n: s.macs for n, s in four.sites.items()}


# --- selectors


def test_selectors_are_globs_roles_and_kinds_in_model_order() -> None:
    graph = small_graph("dit")
    assert graph.select("transformer_blocks.0.attn1.*") == [
        f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert graph.select("role:modulation") == _roles(graph, "modulation")
    assert graph.select(["kind:value", "kind:query"]) == [
        f"transformer_blocks.{i}.attn1.{name}" for i in (0, 1) for name in ("to_q", "to_v")
    ]
    assert graph.select("*") == list(graph.sites)
    assert small_graph("flux").select("kind:attention_out")[-1] == "single_transformer_blocks.1.proj_out"


@pytest.mark.parametrize("pattern", ["transformer_blocks.9.*", "role:tokens", "kind:", "to_q", ""])
def test_a_selector_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(DitqError, match="matches no linear"):
        small_graph("dit").select(["role:token", pattern])


# --- structure, not names


class _Apple(nn.Module):
    """A DiT block (norm and modulation, attention, MLP) in its own words: no class or attribute is called as in diffusers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.pear = nn.Linear(width, 6 * width)
        self.fig, self.plum, self.kiwi = (nn.Linear(width, width) for _ in range(3))
        self.lime = nn.Linear(width, width)
        self.date, self.sloe = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, grapes: torch.Tensor, sugar: torch.Tensor) -> torch.Tensor:
        pieces = [piece[:, None] for piece in self.pear(nn.functional.silu(sugar)).chunk(6, dim=-1)]
        mixed = nn.functional.layer_norm(grapes, grapes.shape[-1:]) * (1 + pieces[4]) + pieces[2]
        split = [m(mixed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.fig, self.plum, self.kiwi)]
        joined = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)
        grapes = grapes + pieces[0] * self.lime(joined)
        mixed = nn.functional.layer_norm(grapes, grapes.shape[-1:]) * (1 + pieces[5]) + pieces[1]
        return grapes + pieces[3] * self.sloe(nn.functional.gelu(self.date(mixed)))


class _Orchard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.water = nn.Linear(8, 48), nn.Linear(4, 48)
        self.trees = nn.ModuleList(_Apple(48, 4) for _ in range(2))
        self.basket = nn.Linear(48, 8)

    def forward(self, fruit: torch.Tensor, rain: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        fruit, rain = self.gate(fruit), self.water(rain)
        for tree in self.trees:
            fruit = tree(fruit, sugar=rain)
        return (self.basket(fruit),)


def test_a_transformer_in_other_words_is_found_and_folded_as_well() -> None:
    torch.manual_seed(0)
    model, inputs = _Orchard().eval().requires_grad_(False), {"fruit": torch.randn(2, 20, 8), "rain": torch.randn(2, 4)}
    graph = DiTGraph(model, inputs)
    assert list(graph.blocks) == ["trees.0", "trees.1"]
    assert _roles(graph, "embedder") == ["gate", "water"] and _roles(graph, "final") == ["basket"]
    assert _roles(graph, "modulation") == ["trees.0.pear", "trees.1.pear"]
    assert _kinds(graph, "trees.1") == {
        "fig": "query", "plum": "key", "kiwi": "value", "lime": "attention_out", "date": "feed_forward_in",
        "sloe": "feed_forward_out",
    }  # fmt: skip
    assert graph.groups["trees.0.fig"].sites == ("trees.0.fig", "trees.0.plum", "trees.0.kiwi")
    assert graph.groups["trees.0.fig"].feed == LinearModulation("trees.0.pear", 2 * 48, 4 * 48)
    assert graph.groups["trees.0.date"].feed == LinearModulation("trees.0.pear", 1 * 48, 5 * 48)
    reference = forward(model, inputs)
    context = Context(statistics_of(graph, inputs=[inputs]))
    Smooth().run(graph, context)
    Rotate(mode="hadamard").run(graph, context)
    assert (forward(model, inputs) - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_found_to_feed_an_input_can_take_a_scale_and_a_shift(family: str) -> None:
    graph = small_graph(family)
    inputs = small_inputs(graph.model, seed=5)
    reference = forward(graph.model, inputs)
    report = Smooth(select=["*"]).run(graph, Context(statistics_of(graph)))
    assert report.summary["inputs folded"] == sum(group.feed is not None for group in graph.groups.values())
    assert (forward(graph.model, inputs) - reference).norm() < 1e-5 * reference.norm()


def test_the_largest_of_the_first_pixarts_gets_its_picture_size_without_being_told():
    """Its config leaves use_additional_conditions to the class, which decides by the size of 1024 pixels."""
    config = {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "cross_attention_dim": 96,
              "caption_channels": 24, "sample_size": 128}  # fmt: skip
    model = diffusers.PixArtTransformer2DModel(**config).eval()
    family = family_of("PixArtTransformer2DModel")
    assert family is not None
    graph = DiTGraph(model, family.example_inputs(model.config, 2, 0))
    assert "adaln_single.emb.resolution_embedder.linear_1" in graph.sites
