"""Token attentions as ONNX operators compute what the parts mean, for pictures of any size that the graph is run with."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from ditq.errors import DitqError
from ditq.export import load_engine
from ditq.export.onnx_graph import DOMAIN, OPSET, TOKEN_ATTENTION
from ditq.export.session import open_session, session_options
from ditq.export.targets.onnxruntime_cpu import lower
from ditq.graph import DiTGraph
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.held_tiles import HeldTiles, Turn, Turns
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention, token_attentions
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.numerics.token_order import Kind, TokenOrder
from ditq.numerics.window import Window
from ditq.passes import Context
from ditq.passes.token_order import TokenOrderPass
from ditq.report.speed import called
from tests.export.quantized import engine_of, relative, shallow_model
from tests.families_small import forward, small_graph, small_inputs
from tests.nn.test_token_attention import converted, mixed, sized

HEADS, WIDTH, SCALE = 2, 16, 0.3
SIZES = ("text", "height", "width", "frames")
MOVES = ("listed", "places")
FLOAT, WHOLE = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
# float32 sums in another order, through at most three products
CLOSE = 1e-5


def graph_of(part: TokenAttention, grid: Grid, fixed: bool) -> ir.Model:
    """The part's node alone; the picture's size is constant, or an input."""
    shape = ir.Shape([2, HEADS, "tokens", WIDTH])
    given = [ir.Value(name=name, shape=shape, type=FLOAT) for name in ("query", "key", "value")]
    sizes = {name: ir.Value(name=name, shape=ir.Shape([1]), type=WHOLE) for name in SIZES}
    known = [name for name in SIZES if fixed or (name == "frames" and grid.frames == 1)]
    for name in known:
        sizes[name].const_value = ir.tensor([getattr(grid, name)])
    moved = {
        name: ir.Value(name=f"order.{name}", shape=ir.Shape(["image"]), type=WHOLE)
        for name in MOVES
        if grid.order is not None
    }
    tensors = [ir.Value(name=f"tensor{i}", const_value=ir.tensor(t.numpy())) for i, t in enumerate(part.tensors())]
    for value in tensors:
        assert value.const_value is not None
        value.shape, value.type = ir.Shape(value.const_value.shape), ir.TensorType(value.const_value.dtype)
    common = {"heads": HEADS, "width": WIDTH, "text": part.text, "usual": part.usual, "text_first": grid.text_first}
    if grid.order is not None:
        common["order"] = asdict(grid.order)
    attributes: Mapping[str, Any] = {
        "site": "site",
        "kind": part.kind,
        "settings": json.dumps({**part.settings(), **common}),
        "scale": SCALE,
    }
    places = list(moved.values()) or [None, None]
    node = ir.node(TOKEN_ATTENTION, [*given, *sizes.values(), *places, *tensors], attributes, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", FLOAT, shape
    constants = [*tensors, *(sizes[name] for name in known)]
    graph = ir.Graph(
        [*given, *(value for name, value in sizes.items() if name not in known), *moved.values()],
        [y],
        nodes=[node],
        initializers=constants,
        opset_imports={"": OPSET, DOMAIN: 1},
        name="form",
    )
    model = ir.Model(graph, ir_version=10)
    lower(model, {})
    return model


def check_form(part: TokenAttention, grid: Grid, others: list[Grid]) -> set[str]:
    """The form with constant sizes and the one with sizes as inputs, the latter at other sizes too; operators of both."""
    kinds: set[str] = set()
    for fixed, grids in ((True, [grid]), (False, [grid, *others])):
        model = graph_of(part, grid, fixed)
        kinds |= {node.op_type for node in model.graph}
        session = open_session(ir.to_proto(model).SerializeToString(), session_options(1))
        for found in grids:
            generator = torch.Generator().manual_seed(3)
            tokens = found.text + found.image
            given = [torch.randn(2, HEADS, tokens, WIDTH, generator=generator) for _ in range(3)]
            part.grid = found
            expected = part(*given, None, SCALE)
            arrays = dict(zip(("query", "key", "value"), (tensor.numpy() for tensor in given), strict=True))
            wanted = {value.name for value in model.graph.inputs} & set(SIZES)
            arrays |= {name: torch.tensor([getattr(found, name)]).numpy() for name in wanted}
            if found.order is not None:
                arrays |= {f"order.{name}": getattr(found.order, name)(*found.sides) for name in MOVES}
            y = torch.from_numpy(session.run(None, arrays)[0])
            assert relative(y, expected) < CLOSE, (fixed, found)
    return kinds


def part_of(kind: type[TokenAttention], text: bool, **settings: Any) -> TokenAttention:
    torch.manual_seed(0)
    part = kind("site", TokenLayout(), HEADS, WIDTH, text, 30, **settings)
    for parameter in part.parameters():
        parameter.copy_(torch.rand_like(parameter) + 0.1)
    if isinstance(part, SparseAttention) and part.seen is not None:
        tiles = part.seen.shape[1]
        part.seen.copy_(torch.rand(HEADS, tiles, tiles).argsort(-1)[..., : part.keep])
    return part


def grids(text: bool) -> tuple[Grid, list[Grid]]:
    others = [Grid(3, 5, 7), Grid(1, 2, 12), Grid(9, 13, 9)]
    return Grid(6 * text, 8, 8, False), [Grid(found.text * text, found.height, found.width, False) for found in others]


@pytest.mark.parametrize("text", [True, False], ids=["text", "image"])
@pytest.mark.parametrize(
    ("window", "pool"),
    [
        (Window("circle", 3, 4), 0),
        (Window("tiles", 3, 2), 0),
        (Window("tiles", 2, 3), 3),
        ([Window("circle", 2, 3), Window("tiles", 3, 2)], 2),
        ([None, Window("tiles", 1, 3)], 2),
    ],
    ids=str,
)
def test_windows_compute_what_they_mean_at_every_size(
    window: Window | list[Window | None], pool: int, text: bool
) -> None:
    kinds = check_form(part_of(LocalAttention, text, window=window, pool=pool), *grids(text))
    assert not kinds & {"NonZero", "ScatterND", "ScatterElements", "Loop", "Attention"}


@pytest.mark.parametrize("text", [True, False], ids=["text", "image"])
@pytest.mark.parametrize(
    "settings",
    [
        {"features": "relu"},
        {"features": "elu", "locality": True},
        {"features": "softmax", "window": Window("circle", 2, 3)},
        {"features": "softmax", "window": Window("tiles", 3, 2), "added": True, "locality": True},
    ],
    ids=str,
)
def test_linear_attention_computes_what_it_means_at_every_size(settings: dict[str, Any], text: bool) -> None:
    kinds = check_form(part_of(LinearAttention, text, **settings), *grids(text))
    assert not kinds & {"NonZero", "ScatterND", "ScatterElements", "Loop", "Attention"}


@pytest.mark.parametrize("text", [True, False], ids=["text", "image"])
@pytest.mark.parametrize("settings", [{"factor": 2}, {"factor": 3}, {"factor": 3, "count": False}], ids=str)
def test_compressed_keys_compute_what_they_mean_at_every_size(settings: dict[str, Any], text: bool) -> None:
    kinds = check_form(part_of(CompressedKeys, text, **settings), *grids(text))
    assert "MultiHeadAttention" in kinds  # one kernel, with no matrix of scores
    assert not kinds & {"NonZero", "ScatterND", "ScatterElements", "Loop", "Attention", "Softmax"}


@pytest.mark.parametrize("text", [True, False], ids=["text", "image"])
@pytest.mark.parametrize("means", [True, False], ids=["means", "nothing"])
@pytest.mark.parametrize(("tile", "keep"), [(2, 5), (3, 3), (4, 9)])
def test_tiles_chosen_at_a_call_compute_what_they_mean_at_every_size(
    tile: int, keep: int, means: bool, text: bool
) -> None:
    kinds = check_form(part_of(SparseAttention, text, tile=tile, keep=keep, means=means), *grids(text))
    assert "TopK" in kinds and not kinds & {"NonZero", "ScatterND", "Loop", "Attention"}
    assert ("ScatterElements" in kinds) == means


@pytest.mark.parametrize("text", [True, False], ids=["text", "image"])
@pytest.mark.parametrize("means", [True, False], ids=["means", "nothing"])
@pytest.mark.parametrize(("tile", "keep"), [(2, 5), (3, 3)])
def test_tiles_chosen_before_compute_what_they_mean_at_their_size(
    tile: int, keep: int, means: bool, text: bool
) -> None:
    part = part_of(SparseAttention, text, tile=tile, keep=keep, means=means, picture=(8, 8))
    kinds = check_form(part, grids(text)[0], [])
    assert not kinds & {"TopK", "GatherND", "Range", "NonZero", "ScatterND", "Loop", "Attention"}
    assert ("ScatterElements" in kinds) == means
    with pytest.raises(
        DitqError, match=r"site: .* pictures of 8 x 8 tokens, not of 9 x 4; ask for that size, or compile"
    ):
        graph_of(part, Grid(6 * text, 9, 4, False), fixed=True)


VIDEOS: list[tuple[type[TokenAttention], bool, dict[str, Any]]] = [
    (LocalAttention, False, {"window": Window("tiles", 3, 2, 3, 2)}),
    (LocalAttention, True, {"window": Window("circle", 3, 2, 1, 3), "pool": 2}),
    (LinearAttention, False, {"features": "relu", "window": Window("tiles", 2, 3)}),
    (CompressedKeys, True, {"factor": 2}),
    (SparseAttention, False, {"tile": 2, "keep": 5, "means": True}),
]


@pytest.mark.parametrize(("kind", "text", "settings"), VIDEOS, ids=lambda given: getattr(given, "kind", str(given)))
def test_videos_are_computed_as_meant_at_every_length_and_size(
    kind: type[TokenAttention], text: bool, settings: dict[str, Any]
) -> None:
    others = [Grid(3 * text, 5, 7, False, 2), Grid(9 * text, 3, 6, False, 7)]
    check_form(part_of(kind, text, **settings), Grid(6 * text, 6, 5, False, 5), others)


def test_text_may_stand_first() -> None:
    kinds: list[tuple[type[TokenAttention], dict[str, Any]]] = [
        (LocalAttention, {"window": Window("tiles", 1, 4)}),
        (CompressedKeys, {"factor": 2}),
        (SparseAttention, {"tile": 3, "keep": 2, "means": True}),
    ]
    for kind, settings in kinds:
        part = part_of(kind, True, **settings)
        check_form(part, Grid(6, 8, 8, True), [Grid(2, 5, 9, True)])


ORDERED: list[tuple[type[TokenAttention], dict[str, Any]]] = [
    (LocalAttention, {"window": [Window("circle", 3, 4), Window("tiles", 3, 2)], "pool": 2}),
    (LinearAttention, {"features": "softmax", "window": Window("tiles", 2, 4), "locality": True}),
    (CompressedKeys, {"factor": 3}),
    (SparseAttention, {"tile": 4, "keep": 3, "means": True}),
]


@pytest.mark.parametrize("text", [True, False], ids=["text", "image"])
@pytest.mark.parametrize(("kind", "settings"), ORDERED, ids=lambda given: getattr(given, "kind", ""))
def test_tokens_in_another_order_are_found_at_every_size(
    kind: type[TokenAttention], settings: dict[str, Any], text: bool
) -> None:
    pictures, videos = grids(text), (Grid(6 * text, 6, 5, False, 5), [Grid(3 * text, 5, 7, False, 2)])
    for order in (TokenOrder("windows", 4), TokenOrder("windows", 3)):
        for grid, others in (pictures, videos) if "locality" not in settings else (pictures,):
            ordered = [replace(found, order=order) for found in (grid, *others)]
            check_form(part_of(kind, text, **settings), ordered[0], ordered[1:])


def test_tiles_that_lie_in_order_are_not_gathered() -> None:
    part = part_of(LocalAttention, False, window=Window("tiles", 1, 4))
    grid = grids(False)[0]
    gathers = [
        sum(node.op_type == "Gather" for node in graph_of(part, replace(grid, order=order), fixed=True).graph)
        for order in (None, TokenOrder("windows", 4), TokenOrder("hilbert", picture=(8, 8)))
    ]
    assert gathers == [4, 2, 4]  # of queries, keys, values and answers


def check_engine(model: nn.Module, folder: Path, *sides: tuple[int, int]) -> None:
    engine = engine_of(model, folder)
    loaded, exact = load_engine(engine.folder), load_engine(engine.folder, target="torch")
    for inputs in (small_inputs(model, 3, seed=7), *(sized(model, *size) for size in sides)):
        expected = forward(model, inputs)
        assert relative(loaded(**inputs).sample, expected) < CLOSE
        assert relative(exact(**inputs).sample, expected) < CLOSE


def ordered(
    graph: DiTGraph, parts: list[tuple[type[TokenAttention], dict[str, Any]]], order: Kind = "windows"
) -> nn.Module:
    """The graph's model with these parts, its tokens in that order."""
    graph.model = mixed(graph, parts)
    TokenOrderPass(order=order, tile=2).run(graph, Context())
    return graph.model


def test_an_engine_runs_other_pictures_than_it_was_traced_with(tmp_path: Path) -> None:
    parts: list[tuple[type[TokenAttention], dict[str, Any]]] = [
        (LocalAttention, {"window": [None, Window("tiles", 3, 2)]}),
        (CompressedKeys, {"factor": 2}),
        (SparseAttention, {"tile": 2, "keep": 5, "means": True}),
        (LinearAttention, {"features": "relu"}),
    ]
    check_engine(ordered(small_graph("flux"), parts), tmp_path / "engine", (6, 11))


def test_an_engine_runs_other_videos_than_it_was_traced_with(tmp_path: Path) -> None:
    parts: list[tuple[type[TokenAttention], dict[str, Any]]] = [
        (LocalAttention, {"window": Window("tiles", 3, 2, 1, 2)}),
        (CompressedKeys, {"factor": 2}),
    ]
    check_engine(ordered(small_graph("wan"), parts), tmp_path / "engine", (5, 6))


def test_an_engine_for_pictures_of_one_size_refuses_others_in_one_line(tmp_path: Path) -> None:
    shallow = shallow_model("flux")
    model = converted(DiTGraph(shallow, small_inputs(shallow)), SparseAttention, tile=3, keep=2, picture=(8, 8))
    for part in token_attentions(model).values():
        assert isinstance(part, SparseAttention) and part.seen is not None
        part.seen.copy_(torch.rand(part.heads, 9, 9).argsort(-1)[..., :2])
    engine = engine_of(model, tmp_path / "engine")
    for target in ("onnxruntime-cpu", "torch"):
        loaded = load_engine(engine.folder, target=target)
        inputs = small_inputs(model, 3, seed=7)
        assert relative(loaded(**inputs).sample, forward(model, inputs)) < CLOSE
        for sides in ((4, 16), (6, 11)):  # as many tokens, and others
            with pytest.raises(DitqError, match=rf"pictures of 8 x 8 tokens, not of {sides[0]} x {sides[1]}") as caught:
                loaded(**sized(model, *sides))
            assert "\n" not in str(caught.value)


def test_an_engine_along_a_curve_is_for_pictures_of_one_size(tmp_path: Path) -> None:
    shallow = shallow_model("flux")
    parts: list[tuple[type[TokenAttention], dict[str, Any]]] = [(LocalAttention, {"window": Window("tiles", 1, 4)})]
    plain, graph = copy.deepcopy(shallow), DiTGraph(shallow, small_inputs(shallow))
    mixed(DiTGraph(plain, small_inputs(plain)), parts)
    engine = engine_of(ordered(graph, parts, "hilbert"), tmp_path / "engine")
    inputs = small_inputs(plain, 3, seed=7)
    for target in ("onnxruntime-cpu", "torch"):
        loaded = load_engine(engine.folder, target=target)
        assert relative(loaded(**inputs).sample, forward(plain, inputs)) < CLOSE
        for sides in ((4, 16), (6, 11)):
            with pytest.raises(DitqError, match=rf"order .* pictures of 8 x 8 tokens, not of {sides[0]} x {sides[1]}"):
                loaded(**sized(plain, *sides))
    manifest = json.loads((engine.folder / "engine.json").read_text())
    damages: list[dict[str, Any]] = [{"kind": "zigzag"}, {"tile": "x"}, {"more": 1}, {"picture": 3}]
    for damage in damages:
        damaged = copy.deepcopy(manifest)
        part = next(part for part in damaged["structure"]["structural"] if part["kind"] == "token_order")
        part["spec"]["layout"]["order"] |= damage
        (engine.folder / "engine.json").write_text(json.dumps(damaged))
        with pytest.raises(DitqError, match=r"damaged \(no valid 'layout'\); compile the engine again"):
            load_engine(engine.folder)


def test_an_engine_holds_tiles_from_step_to_step_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = shallow_model("flux")
    model = converted(DiTGraph(shallow, small_inputs(shallow)), HeldTiles, tile=2, keep=2, every=2)
    with pytest.raises(DitqError, match=r"site: a graph has no form for held tiles; compile for another target"):
        graph_of(part_of(HeldTiles, True, tile=2, keep=2, every=2), grids(True)[0], fixed=True)
    told: list[TokenAttention] = []
    monkeypatch.setattr(
        importlib.import_module("ditq.export.targets.torch"), "Turns", lambda parts: Turns(told.extend(parts) or told)
    )
    loaded = load_engine(engine_of(model, tmp_path / "engine", target_name="cuda").folder, target="torch")
    first, second = ({**sized(model, 8, 8), "timestep": torch.full((2,), time)} for time in (0.9, 0.5))
    exact = [forward(shallow_model("flux"), inputs) for inputs in (first, second)]
    parts = [part for part in token_attentions(model).values() if isinstance(part, HeldTiles)]

    def meant(inputs: Mapping[str, Any], turn: Turn) -> torch.Tensor:
        for part in parts:
            part.turn = turn
        return forward(model, dict(inputs))

    call, (part,) = called(loaded, first), [part for part in told if isinstance(part, HeldTiles)][:1]
    searched = []
    for _ in range(4):  # as `ditq bench` does
        call()
        assert part.turn is not None
        searched.append(part.searches(part.turn))
    assert searched == [True, False, True, False]
    for _ in range(2):  # pictures
        assert relative(loaded(**first).sample, exact[0]) < CLOSE  # attention to all
        meant(first, Turn(0, "call", True))
        found = loaded(**second).sample
        assert relative(found, meant(second, Turn(1, "call", False))) < CLOSE
        assert relative(found, exact[1]) > 100 * CLOSE
