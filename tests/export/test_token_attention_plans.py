"""TensorRT plans of attentions that know the picture: built, proven, for one picture where positions tell its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto

from ditq.errors import DitqError
from ditq.export import Engine
from ditq.export.plans.fold import Folded, fold
from ditq.export.plans.layers import Layer
from ditq.export.plans.make import make_plans
from ditq.export.plans.proof import _read
from ditq.export.plans.run import check_picture
from ditq.export.plans.sizes import picture_of, sizes_of
from ditq.export.session import open_session, session_options
from ditq.graph import DiTGraph
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.window import Window
from ditq.passes import Context
from ditq.passes.token_order import TokenOrderPass
from tests.export.quantized import engine_of, quantize_blocks, relative, shallow_model
from tests.export.test_plans import sizes_for
from tests.families_small import forward, small_inputs
from tests.nn.test_token_attention import mixed, sized

# Every product that is not quantized rounds its sides to float16's 11 bits; their roundings mostly cancel.
HALF = 3e-3


Part = tuple[type[TokenAttention], dict[str, Any]]


def with_parts(model: Any, *parts: Part) -> Any:
    return mixed(DiTGraph(model, small_inputs(model)), list(parts), usual=40)


def in_order(model: Any) -> Any:
    """The same with its tokens tile by tile."""
    graph = DiTGraph(model, small_inputs(model))
    TokenOrderPass(tile=2).run(graph, Context())
    return graph.model


@pytest.mark.parametrize(("family", "blocks", "parts"), [
    ("flux", {"num_single_layers": 2}, [
        (LocalAttention, {"window": [None, Window("tiles", 1, 2)], "pool": 2}),
        (LinearAttention, {"features": "softmax", "window": Window("tiles", 3, 2)}),
        (CompressedKeys, {"factor": 2}),
    ]),
    ("pixart", {}, [(LinearAttention, {"features": "relu", "locality": True})]),
    ("wan", {"num_layers": 2}, [
        (LocalAttention, {"window": Window("circle", 2, 2, 1, 2)}),
        (SparseAttention, {"tile": 2, "keep": 2, "means": True}),
    ]),
], ids=["text", "picture", "video"])  # fmt: skip
def test_a_plan_multiplies_windows_in_half_and_sums_over_tokens_in_float(
    family: str, blocks: dict[str, int], parts: list[Part], tmp_path: Path
) -> None:
    model = with_parts(shallow_model(family, **blocks), *parts)
    model = quantize_blocks(model if family == "pixart" else in_order(model))
    engine = engine_of(model, tmp_path / "engine", target_name="tensorrt")
    sizes = "batch=1:2:3,text_tokens=8:16:32,picture=8x8" if family == "flux" else sizes_for(engine)
    engine, made = make_plans(engine, ("sm89" if family == "flux" else "sm120",), sizes)
    assert all(plan.proof.complete and plan.proof.planned == len(engine.sites) > 5 for plan in made), made
    for plan in engine.plans:
        layers = [layer for layer in _read(engine, plan)["model.onnx"] if layer.multiplies]
        for kind, _ in parts:
            check_products(kind, layers)


def check_products(kind: type[TokenAttention], layers: list[Layer]) -> None:
    """Of the attentions of that kind."""
    own = {name: layer for layer in layers for name in layer.nodes if f"/{kind.kind}/" in name and layer.kind != "kgen"}
    types = {name.rpartition("/")[2]: set(layer.inputs + layer.constants) for name, layer in own.items()}
    if kind is LinearAttention:
        assert types["sums"] == types["linear"] == {"Float"}, types
        return
    if kind is SparseAttention:
        assert types.pop("tile_scores") == {"Float"}  # which a TopK compares
    assert all(found == {"Half"} for found in types.values()), types
    whole = [layer for layer in layers if any(f"/{kind.kind}/atten" in name for name in layer.nodes)]
    assert whole and all(layer.inputs[:2] == ("Half", "Half") for layer in whole)


def test_where_positions_tell_the_size_a_plan_is_for_one_picture_and_means_the_same_there(tmp_path: Path) -> None:
    model = with_parts(shallow_model("flux"), (LocalAttention, {"window": Window("circle", 3, 2), "pool": 3}))
    engine = engine_of(model, tmp_path / "engine", target_name="tensorrt", sizes={"image_tokens": (16, 48, 64)})
    picture = picture_of(engine, "batch=2")
    assert picture is not None and (picture.height, picture.width) == (6, 8)
    folded = fold(engine.folder / "model.onnx", picture.constants)
    makers = {output for node in folded.proto.graph.node for output in node.output}
    read = {name for node in folded.proto.graph.node if node.op_type == "Gather" for name in node.input[1:]}
    assert read and not {name for name in read if "attention" in name} & makers  # indices are constants
    inputs = sized(model, 6, 8)
    (found,) = open_session(whole(folded).SerializeToString(), session_options(1)).run(
        None, {value.name: inputs[value.name].numpy() for value in folded.proto.graph.input}
    )
    assert relative(torch.from_numpy(found), forward(model, inputs)) < HALF


def whole(folded: Folded) -> onnx.ModelProto:
    """The graph with its constants inside."""
    for tensor in folded.proto.graph.initializer:
        if tensor.name in folded.constants:
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = folded.constants[tensor.name].tobytes()
    return folded.proto


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = with_parts(shallow_model("flux"), (LocalAttention, {"window": Window("tiles", 1, 2)}))
    sizes = {"batch": (1, 1, 2), "image_tokens": (16, 64, 256), "text_tokens": (1, 16, 32)}
    folder = tmp_path_factory.mktemp("windows") / "engine"
    return engine_of(model, folder, target_name="tensorrt", sizes=sizes, picture=(4, 8))


@pytest.mark.parametrize(("text", "wanted"), [
    (None, (4, 8)), ("picture=6x4", (6, 4)), ("image_tokens=60", (6, 10)), ("picture=6x4,image_tokens=24", (6, 4)),
], ids=["calibrated", "asked for", "tokens", "both"])  # fmt: skip
def test_the_picture_is_that_asked_for_or_that_of_calibration(
    windows: Engine, text: str | None, wanted: tuple[int, int]
) -> None:
    picture, sizes = picture_of(windows, text), sizes_of(windows, text)
    assert picture is not None and (picture.height, picture.width) == wanted
    assert sizes["image_tokens"] == (wanted[0] * wanted[1],) * 3 and sizes["batch"] == (1, 1, 2)


@pytest.mark.parametrize(("text", "says"), [
    ("image_tokens=16:64:256", "a plan of this model is for one picture; give image_tokens=NUMBER, or picture=ROWSxCOLUMNS"),
    ("picture=6x4,image_tokens=64", "picture=6x4 are 24 image tokens, but image_tokens is 64"),
    ("picture=6", "'picture=6' is not like|unknown 'picture'"),
])  # fmt: skip
def test_several_sizes_of_one_picture_are_refused(windows: Engine, text: str, says: str) -> None:
    with pytest.raises(DitqError, match=says):
        sizes_of(windows, text)


def test_a_plan_for_any_picture_takes_none(tmp_path: Path) -> None:
    model = with_parts(shallow_model("pixart"), (LocalAttention, {"window": Window("tiles", 1, 2)}))
    engine = engine_of(model, tmp_path / "e", target_name="tensorrt")
    with pytest.raises(DitqError, match="plans of this engine are not for one picture; leave picture out"):
        sizes_of(engine, f"{sizes_for(engine)},picture=4x4")


def test_another_picture_than_the_plans_is_refused_with_the_command_for_it(windows: Engine) -> None:
    model = shallow_model("flux")
    plan = {"picture": [6, 8], "gpu": "sm89"}
    check_picture(windows, plan, {"img_ids": sized(model, 6, 8)["img_ids"]})
    with pytest.raises(DitqError, match=r"has 8 x 6 tokens, .* for 6 x 8; .* --gpu sm89 --sizes picture=8x6$"):
        check_picture(windows, plan, {"img_ids": sized(model, 8, 6)["img_ids"]})
