"""Windows and linear attention on the GPU target: what stands in their place computes their meaning, here on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from ditq.errors import DitqError
from ditq.kernels import answered_attention
from ditq.kernels.answered_attention import KINDS, _compiled, answers_of, laid_out, take_off, tell_grids
from ditq.kernels.asked import answering
from ditq.kernels.on_gpu import as_wanted, to_gpu
from ditq.kernels.traced import compiled
from ditq.nn.answered_attention import unanswer
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.held_tiles import HeldTiles
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.ordered_tokens import ordered_tokens
from ditq.nn.structural.parallel_block import paired
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention, token_attentions
from ditq.numerics.token_layout import Grid
from ditq.numerics.token_order import TokenOrder
from ditq.numerics.window import Window
from ditq.passes import Context
from ditq.passes.parallel_blocks import ParallelBlocks
from ditq.passes.token_order import TokenOrderPass
from tests.export.quantized import relative
from tests.export.test_token_attentions import HEADS, WIDTH, part_of
from tests.families_small import forward, small_graph, small_inputs
from tests.nn.test_token_attention import converted, sized

CPU = torch.device("cpu")
ANSWERED = torch.ops.ditq.answered_attention.default
SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    ("window", "pool"),
    [
        (Window("circle", 3, 4), 0),
        ([Window("tiles", 3, 2), None], 0),
        (Window("tiles", 2, 3, 1, 2), 3),
        (Window("circle", 5, 3, 3, 1), 2),
    ],
    ids=str,
)
def test_windows_by_blocks_compute_what_they_mean(
    window: Window | list[Window | None], pool: int, text_first: bool
) -> None:
    """Softmax in float32 over the same keys in another order; pictures of more than one block, which no square divides."""
    for found in (Grid(9, 13, 17, text_first), Grid(0, 20, 9, text_first), Grid(5, 7, 9, text_first, 5)):
        part = part_of(LocalAttention, found.text > 0, window=window, pool=pool)
        generator = torch.Generator().manual_seed(1)
        given = [torch.randn(2, HEADS, found.text + found.image, WIDTH, generator=generator) for _ in range(3)]
        for order in (None, TokenOrder("windows", 8), TokenOrder("hilbert")):
            ordered = replace(found, order=order)
            expected = part.attention(*given, ordered, 0.3)
            assert relative(KINDS[LocalAttention](part)(*given, ordered, 0.3), expected) < 1e-5


OTHERS: list[tuple[type[TokenAttention], dict[str, Any]]] = [
    (CompressedKeys, {"factor": 2}),
    (SparseAttention, {"tile": 4, "keep": 5}),
    (SparseAttention, {"tile": 4, "keep": 5, "means": True}),
    (HeldTiles, {"tile": 4, "keep": 5, "every": 8, "means": True}),
]


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(("kind", "settings"), OTHERS, ids=["squares", "tiles", "tiles and means", "held tiles"])
def test_other_parts_compute_in_bfloat16_what_they_mean(
    kind: type[TokenAttention], settings: dict[str, Any], text_first: bool
) -> None:
    for found in (Grid(9, 13, 17, text_first), Grid(0, 20, 9, text_first)):
        part = part_of(kind, found.text > 0, **settings)
        generator = torch.Generator().manual_seed(1)
        given = [
            torch.randn(2, HEADS, found.text + found.image, WIDTH, generator=generator).bfloat16() for _ in range(3)
        ]
        expected = part.attention(*[tensor.float() for tensor in given], found, 0.3)
        answered = KINDS[kind](part)(*given, found, 0.3)
        assert answered.dtype == torch.bfloat16
        # Scores, weights and sums rounded to 8 bits, 2^-9 each.
        assert relative(answered.float(), expected) < 0.02


def test_blocks_that_see_nothing_of_each_other_are_skipped() -> None:
    """64 x 64 tokens, circles of 8: of 32 blocks of 8 x 16 a query's own and those up to 7 rows and columns away are left."""
    mask = laid_out(Window("circle", 8, 4), 0, Grid(0, 64, 64), CPU).mask
    seen = (mask.kv_num_blocks + (0 if mask.full_kv_num_blocks is None else mask.full_kv_num_blocks)).flatten()
    assert len(seen) == 32 and int(seen.max()) == 9 and int(seen.min()) == 4


@pytest.mark.parametrize("order", [TokenOrder("windows", 8), TokenOrder("hilbert")], ids=str)
def test_tokens_of_a_model_that_lie_in_such_an_order_stay_where_they_are(order: TokenOrder) -> None:
    """Then as many blocks are left, up to those of a curve that lie the other way."""
    window, grid = Window("circle", 8, 4), Grid(0, 64, 64)
    counts = []
    for found in (grid, replace(grid, order=order)):
        laid = laid_out(window, 0, found, CPU)
        assert (laid.order is None and laid.places is None) == (found.order is not None)
        full = laid.mask.full_kv_num_blocks
        counts.append(int(laid.mask.kv_num_blocks.sum()) + (0 if full is None else int(full.sum())))
    assert counts[1] <= counts[0] * (1.0 if order.kind == "windows" else 1.2)


@pytest.mark.parametrize("pool", [0, 3])
def test_blocks_are_those_that_torch_finds_by_itself(pool: int) -> None:
    """In pictures that end within a block, with text, which is seen whole, and pooled keys."""
    for window in (Window("circle", 5, 3), Window("tiles", 3, 2)):
        laid = laid_out(window, pool, Grid(140, 20, 19), CPU)
        found, queries, keys = laid.mask, 140 + 380, 140 + 380 + (49 if pool else 0)
        assert found.seq_lengths == (queries, keys)
        expected = create_block_mask(found.mask_mod, None, None, queries, keys, device="cpu")
        assert torch.equal(found.to_dense(), expected.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


class Watched(TorchDispatchMode):
    """As torch watches the operators of a compiled graph's first call (_AnalyzeCustomOpInputOutputMode)."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("compiles", [False, True], ids=["by torch's operators", "compiled"])
def test_the_operator_runs_while_torch_watches_it(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There neither vmap nor autograd is dispatched to, which FlexAttention is made of, compiled or not."""
    model = converted(small_graph("flux"), window=Window("circle", 3, 2))
    take_off(model, CPU)
    answer = next(iter(answers_of(model).values()))
    part = answer.part
    part.grid = Grid(7, 11, 13)  # of no other test, so that nothing is known of it yet
    given = [torch.randn(1, part.heads, 7 + 11 * 13, part.width) for _ in range(3)]
    monkeypatch.setattr(answered_attention, "_compiled", lambda function, _: _compiled(function, compiles))
    with torch.no_grad(), answering([answer]), Watched():
        found = ANSWERED(*given, 0, None)
    expected = LocalAttention.attention(part, *given, part.grid, part.width**-0.5)  # type: ignore[arg-type]
    assert relative(found, expected) < 1e-5


MODELS: list[tuple[str, type[TokenAttention], dict[str, Any]]] = [
    ("flux", LocalAttention, {"window": Window("tiles", 1, 2), "pool": 2}),
    ("pixart", LinearAttention, {"features": "softmax", "window": Window("circle", 2, 2)}),
    ("dit", LinearAttention, {"features": "relu", "locality": True}),
    ("wan", LocalAttention, {"window": Window("tiles", 1, 2, 3, 1)}),
    ("dit", CompressedKeys, {"factor": 3}),
    (
        "pixart",
        SparseAttention,
        {"tile": 2, "keep": 2, "picture": (3, 8), "means": True},
    ),  # bfloat16 would choose others
]
SIDES = {"flux": [(3, 8), (8, 3)], "dit": [(5, 5)]}  # DiT takes square pictures only


@pytest.mark.parametrize(("family", "kind", "settings"), MODELS, ids=lambda given: getattr(given, "kind", str(given)))
def test_blocks_with_such_attentions_are_traced_once_for_pictures_of_every_form(
    family: str, kind: type[TokenAttention], settings: dict[str, Any]
) -> None:
    graph = small_graph(family)
    model = converted(graph, kind, **settings)
    if family in ("flux", "wan"):  # which tell where tokens lie by positions, and by the latents' shape
        TokenOrderPass(tile=2).run(graph, Context())
    parts = len(token_attentions(model))
    pictures = [sized(model, *side) for side in SIDES.get(family, [(3, 8)])]
    expected = [forward(model, inputs) for inputs in pictures]
    fast = to_gpu(model, CPU)
    assert not token_attentions(fast) and len(answers_of(fast)) == parts
    graphs: list[fx.GraphModule] = []
    call = compiled(fast, lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
    told = set()
    for inputs, meant in zip(pictures, expected, strict=True):
        told.add(tell_grids(fast, inputs))
        ordered = ordered_tokens(fast)
        assert (ordered is not None) == (family in ("flux", "wan"))
        assert ordered is None or ordered.told in tell_grids(fast, inputs)
        wanted = {name: as_wanted(name, v) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        assert relative(forward(call, wanted).float(), meant) < 0.05  # bfloat16 everywhere but in the parts
    assert len(told) == len(pictures)
    # Both pictures of FLUX have the same shapes, so the same graph, in which the parts know the picture; and so have blocks of
    # one kind, of which there are two, each with parts of its own. FLUX has two kinds of blocks, of which the second's first
    # gets tokens that lie one after the other, and the next ones get parts of what lies joined.
    assert (parts, len(graphs)) == {"flux": (4, 3)}.get(family, (2, 1))
    for graph in graphs:
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count(ANSWERED) == 1
        assert targets.count(SDPA) == (1 if family in ("pixart", "wan") else 0)  # which has cross attention too


def answered_in_traces(model: nn.Module) -> list[int]:
    """How many attentions parts answer for in each traced block of a model, which computes through them what it did."""
    inputs = small_inputs(model)
    expected = forward(model, inputs)
    fast = to_gpu(model, CPU)
    graphs: list[fx.GraphModule] = []
    call = compiled(fast, lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
    tell_grids(fast, inputs)
    wanted = {name: as_wanted(name, v) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
    assert relative(forward(call, wanted).float(), expected) < 0.05
    return [[node.target for node in graph.graph.nodes].count(ANSWERED) for graph in graphs]


def test_blocks_whose_attentions_parts_answer_for_are_not_taken_for_those_without() -> None:
    """The first block has torch's own attention, the second a window; their code and shapes are the same."""
    model = converted(small_graph("dit"), window=Window("circle", 1, 2))
    site = next(iter(token_attentions(model)))
    unanswer(model.get_submodule(site))
    assert answered_in_traces(model) == [0, 1]


def test_a_part_that_the_trace_does_not_reach_is_an_error() -> None:
    model = converted(small_graph("dit"), window=Window("tiles", 1, 2))
    take_off(model, CPU)
    answers = answers_of(model)
    answers["transformer_blocks.1.elsewhere"] = next(iter(answers.values()))
    inputs = small_inputs(model)
    tell_grids(model, inputs)
    with pytest.raises(BackendCompilerFailed, match=r"elsewhere: torch .* traces no attention there") as error:
        forward(compiled(model, lambda graph, _: graph.forward), inputs)
    assert isinstance(error.value.inner_exception, DitqError)  # which the target shows


def test_a_part_outside_of_the_blocks_is_an_error() -> None:
    model = converted(small_graph("dit"), window=Window("tiles", 1, 2))
    take_off(model, CPU)
    answers_of(model)["elsewhere"] = next(iter(answers_of(model).values()))
    with pytest.raises(DitqError, match=r"elsewhere: torch .* traces no attention there"):
        compiled(model)


def test_attentions_of_blocks_in_parallel_are_found_in_their_traces() -> None:
    """Blocks whose forwards others stand around: Dynamo reaches their modules by way of these."""
    graph = small_graph("pixart")
    model = converted(graph, window=Window("circle", 1, 2))
    ParallelBlocks().sketch(graph)
    assert len(paired(model)) == 1 and len(token_attentions(model)) == 2
    assert answered_in_traces(model) == [1, 1]
