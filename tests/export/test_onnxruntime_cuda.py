"""Each form that the target onnxruntime-cuda writes computes what its layer means; ONNX Runtime's CPU provider runs it as it
stands, and every operator of it has a kernel on a GPU, by the CUDA provider's own list."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.session import open_session, session_options
from ditq.export.targets.onnxruntime_cuda import lower
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.carrier import FLOAT8
from ditq.numerics.rotation import hadamard_rotation
from ditq.numerics.window import Window
from tests.export import test_token_attentions
from tests.export.quantized import relative
from tests.export.test_forms import SAME, graph_of, layer_of, tokens
from tests.export.test_token_attentions import grids, part_of

TOKEN, TENSOR, FLOAT = ActivationFormat(8, "token"), ActivationFormat(8, "tensor"), ActivationFormat()
TIMED = ActivationFormat(8, "timestep", edges=(600.0, 300.0))
GROUP = ActivationFormat(4, "group", "midrise", group_size=32)
UNSIGNED = ActivationFormat(4, "token", "unsigned", shift=0.2)
HALF = 2**-10  # both sides of a product of floats are rounded to 11 bits, each within half a unit


def run(model: ir.Model, *inputs: Tensor, timestep: Tensor | None = None) -> Tensor:
    session = open_session(ir.to_proto(model).SerializeToString(), session_options(1))
    given = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    if timestep is not None:
        given["timestep"] = timestep.numpy()
    return torch.from_numpy(session.run(None, given)[0])


def check(layer: QuantLinear, kind: str, rank: int = 3, tolerance: float = SAME) -> ir.Model:
    model = graph_of(layer, rank=rank)
    (planned,) = lower(model, {layer.site: layer})
    assert planned.kind == kind
    x = tokens(layer.in_features, rank)
    assert relative(run(model, x), layer(x)) < tolerance
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "activation",
    [
        TOKEN,
        TENSOR,
        ActivationFormat(6, "token", clip=0.8),
        ActivationFormat(4, "token", "midrise", 0.9),
        GROUP,
        UNSIGNED,
    ],
    ids=["token", "tensor", "six bits clipped", "midrise", "group", "unsigned"],
)
def test_every_grid_of_inputs_is_one_product_of_int8_numbers(activation: ActivationFormat, rank: int) -> None:
    model = check(layer_of(activation=activation, group_size=32), "integer", rank)
    assert operators(model).count("MatMulInteger") == 1
    assert "DequantizeLinear" not in operators(model) and "MatMul" not in operators(model)


def test_the_scale_of_a_timestep_bin_is_chosen_in_the_graph() -> None:
    layer = layer_of(activation=TIMED)
    model = graph_of(layer, timestep=ir.DataType.FLOAT)
    lower(model, {layer.site: layer})
    for time in (700.0, 400.0, 100.0):
        layer.timestep = torch.tensor([time])
        assert relative(run(model, tokens(), timestep=layer.timestep), layer(tokens())) < SAME


@pytest.mark.parametrize("settings", [
    {"bits": 8, "codebook": "uniform"}, {"bits": 3, "group_size": 32}, {"bits": 3, "codebook": "twin_log"},
    {"bits": 4, "codebook": "e2m1"}, {"bits": 5, "codebook": "lloyd_max"},
], ids=["eight bits", "groups", "row tables", "e2m1", "five bits"])  # fmt: skip
def test_every_codebook_is_expanded_to_its_int8_carrier(settings: dict[str, Any]) -> None:
    check(layer_of(**settings), "integer")


@pytest.mark.parametrize("activation", [TOKEN, GROUP], ids=["token", "group"])
@pytest.mark.parametrize("branch", ["integer", "float"])
def test_a_low_rank_branch_stands_beside_the_product(branch: Any, activation: ActivationFormat) -> None:
    check(layer_of(activation=activation, rank=8, branch=branch), "integer", tolerance=HALF)


@pytest.mark.parametrize(("settings", "bits"), [
    ({"codebook": "uniform", "group_size": 32, "float_group_scales": True}, 4),
    ({"codebook": "uniform", "bits": 3, "group_size": 32, "float_group_scales": True}, 4),
    ({"codebook": "uniform", "bits": 2, "group_size": 96, "float_group_scales": True}, 4),
    ({"codebook": "uniform"}, 4),
    ({"codebook": "uniform", "bits": 8}, 8),
    ({"codebook": "lloyd_max", "bits": 3}, 8),
    ({"codebook": "lloyd_max", "group_size": 48, "float_group_scales": True}, 8),
    ({"codebook": "twin_log", "bits": 3}, 8),
    ({"codebook": "uniform", "rank": 8}, 4),
], ids=["four", "three", "two", "row", "eight", "uneven", "uneven groups", "row tables", "branch"])  # fmt: skip
@pytest.mark.parametrize("rank", [2, 3])
def test_weights_of_float_inputs_stay_in_four_bits_where_levels_are_even_and_in_eight_else(
    settings: dict[str, Any], bits: int, rank: int
) -> None:
    model = check(layer_of(activation=FLOAT, **settings), "weight-only kernel", rank, HALF)
    (node,) = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert node.attributes["bits"].as_int() == bits
    assert node.attributes["block_size"].as_int() == (16 if settings.get("group_size") == 48 else 32)
    assert len(node.inputs) == 3  # zero points are none of the mixed kernels'


def test_a_weight_that_no_block_divides_is_expanded_to_float16() -> None:
    model = check(layer_of(width=40, activation=FLOAT, codebook="uniform"), "dequantized", tolerance=HALF)
    assert "MatMulNBits" not in operators(model)
    check(layer_of(activation=FLOAT, carrier=FLOAT8), "dequantized", tolerance=HALF)


@pytest.mark.parametrize(("part", "half"), [
    (part_of(LocalAttention, True, window=Window("circle", 2, 3), pool=2), True),
    (part_of(CompressedKeys, True, factor=2), True),
    (part_of(SparseAttention, True, tile=3, keep=3, means=True), True),
    (part_of(LinearAttention, False, features="softmax", window=Window("tiles", 3, 2), added=True, locality=True), False),
], ids=["windows", "compressed keys", "tiles", "linear"])  # fmt: skip
def test_token_attentions_are_products_in_half_precision_but_for_sums_over_all_tokens(
    part: TokenAttention, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_token_attentions, "lower", lower)
    monkeypatch.setattr(test_token_attentions, "CLOSE", 3 * HALF)  # through at most three products
    test_token_attentions.check_form(part, *grids(half))
    kinds = operators(test_token_attentions.graph_of(part, grids(half)[0], fixed=True))
    assert {"MatMul", "MultiHeadAttention"} & set(kinds) and ("Cast" in kinds) == half


def test_layers_of_one_input_share_its_rotation_and_its_integers() -> None:
    layers = [
        layer_of(site=site, transform=InputTransform(rotations=[(0, 96, hadamard_rotation(96))]))
        for site in ("query", "key", "value")
    ]
    model = graph_of(*layers)
    lower(model, {layer.site: layer for layer in layers})
    kinds = operators(model)
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("MatMulInteger") == 3
    assert kinds.count("MatMul") == 2  # two factors of one rotation


@pytest.mark.parametrize(("activation", "settings", "says"), [
    (ActivationFormat(8, "token", "unsigned", shift=0.2), {}, "holds no unsigned inputs of 8 bits; leave activation_unsigned"),
    (ActivationFormat(8, "token", "float8_e4m3"), {"carrier": FLOAT8}, "no product of float8_e4m3 numbers; set carrier: int8"),
], ids=["unsigned", "fp8"])  # fmt: skip
def test_inputs_that_int8_does_not_hold_are_refused_in_one_line(
    activation: ActivationFormat, settings: dict[str, Any], says: str
) -> None:
    layer = layer_of(activation=activation, **settings)
    with pytest.raises(DitqError, match=f"site: onnxruntime-cuda .*{says}"):
        lower(graph_of(layer), {layer.site: layer})
