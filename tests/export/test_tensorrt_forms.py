"""Each form that the target tensorrt writes computes what its layer means; ONNX Runtime runs it as it stands."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.export.session import open_session, session_options
from ditq.export.targets.tensorrt import lower
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.numerics.carrier import FLOAT4, FLOAT8
from ditq.numerics.rotation import hadamard_rotation
from tests.export.quantized import relative
from tests.export.test_forms import graph_of, layer_of, tokens

TOKEN, TENSOR, FLOAT = ActivationFormat(8, "token"), ActivationFormat(8, "tensor"), ActivationFormat()
TIMED = ActivationFormat(8, "timestep", edges=(600.0, 300.0))
GROUP = ActivationFormat(4, "group", "midrise", group_size=32)
NVFP4 = ActivationFormat(4, "tensor", "float4_e2m1", group_size=16)
FLOAT8_TOKEN = ActivationFormat(8, "token", "float8_e4m3")
# Sums of whole numbers leave the product in float16 where a runtime keeps to the types: half a unit of its 11 bits.
HALF = 2**-11


def run(model: ir.Model, *inputs: Tensor, timestep: Tensor | None = None) -> Tensor:
    """Without ONNX Runtime's own rewriting of the graph."""
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_session(ir.to_proto(model).SerializeToString(), options)
    given = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    if timestep is not None:
        given["timestep"] = timestep.numpy()
    return torch.from_numpy(session.run(None, given)[0])


def check(layer: QuantLinear, kind: str, rank: int = 3) -> ir.Model:
    model = graph_of(layer, rank=rank)
    (planned,) = lower(model, {layer.site: layer})
    assert planned.kind == kind
    x = tokens(layer.in_features, rank)
    assert relative(run(model, x), layer(x)) < HALF
    return model


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "activation",
    [TOKEN, TENSOR, ActivationFormat(6, "token", clip=0.8), ActivationFormat(4, "token", "midrise", 0.9), GROUP],
    ids=["token", "tensor", "six bits clipped", "midrise", "group"],
)
def test_every_grid_of_inputs_is_a_product_of_signed_integers(activation: ActivationFormat, rank: int) -> None:
    model = check(layer_of(activation=activation, group_size=32), "integer", rank)
    zeros = {node.inputs[2].const_value.numpy().item() for node in model.graph if node.op_type == "QuantizeLinear"}  # type: ignore[union-attr]
    assert zeros == {0}


def test_the_scale_of_a_timestep_bin_is_chosen_in_the_graph() -> None:
    layer = layer_of(activation=TIMED)
    model = graph_of(layer, timestep=ir.DataType.FLOAT)
    lower(model, {layer.site: layer})
    for time in (700.0, 400.0, 100.0):
        layer.timestep = torch.tensor([time])
        assert relative(run(model, tokens(), timestep=layer.timestep), layer(tokens())) < HALF


@pytest.mark.parametrize("settings", [
    {"bits": 8, "codebook": "uniform"}, {"bits": 3, "group_size": 32}, {"bits": 3, "codebook": "twin_log"},
    {"bits": 4, "codebook": "e2m1"}, {"bits": 5, "codebook": "lloyd_max"},
], ids=["eight bits", "groups", "row tables", "e2m1", "five bits"])  # fmt: skip
def test_every_codebook_is_expanded_to_its_int8_carrier(settings: dict[str, Any]) -> None:
    check(layer_of(**settings), "integer")


@pytest.mark.parametrize("activation", [TOKEN, GROUP], ids=["token", "group"])
@pytest.mark.parametrize("branch", ["integer", "float"])
def test_a_low_rank_branch_stands_beside_the_product(branch: Any, activation: ActivationFormat) -> None:
    check(layer_of(activation=activation, rank=8, branch=branch), "integer")


@pytest.mark.parametrize(
    "activation", [FLOAT8_TOKEN, ActivationFormat(8, "tensor", "float8_e4m3")], ids=["token", "tensor"]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_fp8_numbers_are_multiplied_as_such(bits: int, activation: ActivationFormat) -> None:
    codebook = "uniform" if bits == 8 else "twin_log_shared"
    check(layer_of(bits=bits, codebook=codebook, activation=activation, carrier=FLOAT8), "float8")


def nvfp4_layer(**settings: Any) -> QuantLinear:
    layer = layer_of(codebook="e2m1", activation=NVFP4, group_size=16, carrier=FLOAT4, **settings)
    assert layer.activation_scale is not None
    layer.activation_scale.fill_(60 / 2688)  # of what `tokens` makes, hardly anything lies beyond
    return layer


@pytest.mark.parametrize("branch", [{}, {"rank": 8, "branch": "float"}], ids=["plain", "branch"])
@pytest.mark.parametrize("rank", [2, 3])
def test_fp4_numbers_are_multiplied_with_the_scales_of_their_blocks(branch: dict[str, Any], rank: int) -> None:
    layer = nvfp4_layer(**branch)
    model = check(layer, "float4", rank)
    assert {node.op_type for node in model.graph if node.domain} == {"FP4Input", "FP4Weight"}
    assert (
        relative(layer(tokens(96, rank)), torch.nn.functional.linear(tokens(96, rank), layer.weight(), layer.bias))
        < 0.3
    )


def test_layers_of_one_input_share_its_fp4_numbers() -> None:
    layers = [nvfp4_layer(site=site) for site in ("query", "key", "value")]
    model = graph_of(*layers)
    lower(model, {layer.site: layer for layer in layers})
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("FP4Input"), kinds.count("FP4Weight"), kinds.count("MatMul")) == (1, 3, 3)


def test_the_largest_sum_of_fp4_numbers_is_within_float16() -> None:
    layer = nvfp4_layer(width=4096, rows=4, bias=False)
    layer.codes.fill_(0xFF)
    assert layer.multiplier is not None
    layer.multiplier.fill_(448)
    x = torch.full((2, 3, 4096), 500.0)
    model = graph_of(layer)
    lower(model, {layer.site: layer})
    assert relative(run(model, x), layer(x)) < HALF


@pytest.mark.parametrize(("settings", "kind"), [
    ({"codebook": "uniform", "group_size": 32, "float_group_scales": True}, "weight-only kernel"),
    ({"codebook": "uniform", "bits": 3, "group_size": 32, "float_group_scales": True}, "weight-only kernel"),
    ({"codebook": "uniform", "bits": 8}, "weight-only kernel"),
    ({"codebook": "lloyd_max", "bits": 3}, "weight-only kernel"),
    ({"codebook": "lloyd_max", "group_size": 32, "float_group_scales": True}, "dequantized"),
    ({"codebook": "uniform", "rank": 8}, "weight-only kernel"),
], ids=["int4", "int4 of three bits", "int8", "int8 of three bits", "expanded", "branch"])  # fmt: skip
@pytest.mark.parametrize("rank", [2, 3])
def test_weights_of_float_inputs_stay_in_few_bits_where_tensorrt_has_a_form(
    settings: dict[str, Any], kind: str, rank: int
) -> None:
    check(layer_of(activation=FLOAT, **settings), kind, rank)


def test_layers_of_one_input_share_its_rotation_and_its_integers() -> None:
    layers = [
        layer_of(site=site, transform=InputTransform(rotations=[(0, 96, hadamard_rotation(96))]))
        for site in ("query", "key", "value")
    ]
    model = graph_of(*layers)
    lower(model, {layer.site: layer for layer in layers})
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 1
    assert kinds.count("MatMul") == 2 + 3  # two factors of one rotation, three weights


def test_the_largest_sum_that_can_be_is_within_float16() -> None:
    """Every input at the end of its grid and every weight too: no sum may be infinite, whatever the width."""
    layer = layer_of(width=4096, rows=4, bits=8, codebook="uniform_absmax", bias=False)
    layer.codes.fill_(-128)
    model = graph_of(layer)
    lower(model, {layer.site: layer})
    x = torch.full((2, 3, 4096), 5.0)
    assert relative(run(model, x), layer(x)) < HALF


def test_unsigned_inputs_are_refused_in_one_line() -> None:
    layer = layer_of(activation=ActivationFormat(4, "token", "unsigned", shift=0.2))
    with pytest.raises(DitqError, match="site: tensorrt has no unsigned inputs; leave activation_unsigned out"):
        lower(graph_of(layer), {layer.site: layer})


def test_weights_of_8_bits_are_opened_as_engines_are_however_many_there_are() -> None:
    """With integer products exact on every CPU, where ONNX Runtime makes each such weight uint8."""
    layers = [layer_of(site=site, bits=8, codebook="uniform", activation=TOKEN) for site in ("query", "key")]
    model = graph_of(*layers)
    lower(model, {layer.site: layer for layer in layers})
    session = open_session(ir.to_proto(model).SerializeToString(), session_options(1))
    given = {f"x{i}": tokens().numpy() for i, _ in enumerate(session.get_inputs())}
    for layer, found in zip(layers, session.run(None, given), strict=True):
        assert relative(torch.from_numpy(found), layer(tokens())) < HALF
