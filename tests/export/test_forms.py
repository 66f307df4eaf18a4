"""Each ONNX form of a quantized linear computes what its layer means, and runs as the kernel that was planned."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export.fusion import INTEGER_KERNELS, kernels_of
from ditq.export.onnx_graph import DOMAIN, OPSET
from ditq.export.session import open_session, session_options
from ditq.export.targets.onnxruntime_cpu import lower
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.numerics.carrier import FLOAT8
from ditq.numerics.learned_rotation import refine
from ditq.numerics.rotation import block_hadamard_rotation, hadamard_rotation, outlier_rotation, regular_rotation
from tests.export.quantized import quantized, relative

TOKEN, TENSOR, FLOAT = ActivationFormat(8, "token"), ActivationFormat(8, "tensor"), ActivationFormat()
# The integers are the same on both sides; what is left are two float32 multiplications and an addition a value.
SAME = 1e-6


def layer_of(width: int = 96, site: str = "site", rows: int = 40, bias: bool = True, **settings: Any) -> QuantLinear:
    torch.manual_seed(3)
    linear = nn.Linear(width, rows, bias=bias)
    nn.init.normal_(linear.weight, std=0.1)
    return quantized(linear, site, **settings)


def graph_of(
    *layers: QuantLinear, rank: int = 3, joined: tuple[int, ...] = (), timestep: ir.DataType | None = None
) -> ir.Model:
    """x -> each layer; with `joined`, x is the concatenation of inputs of those widths; with `timestep`, of that type."""
    shape = [2, "tokens"][: rank - 1]
    widths = joined or (layers[0].in_features,)
    inputs = [
        ir.Value(name=f"x{i}", shape=ir.Shape([*shape, width]), type=ir.TensorType(ir.DataType.FLOAT))
        for i, width in enumerate(widths)
    ]
    nodes, x = [], inputs[0]
    if joined:
        nodes.append(ir.node("Concat", inputs, {"axis": -1}))
        x = nodes[0].outputs[0]
        x.name, x.shape, x.type = "x", ir.Shape([*shape, sum(widths)]), ir.TensorType(ir.DataType.FLOAT)
    outputs = []
    for layer in layers:
        node = ir.node("QuantLinear", [x], {"site": layer.site, "out_features": layer.out_features}, domain=DOMAIN)
        value = node.outputs[0]
        value.name, value.type = f"y.{layer.site}", ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([*shape, layer.out_features])
        nodes.append(node)
        outputs.append(value)
    if timestep is not None:
        inputs.append(ir.Value(name="timestep", shape=ir.Shape(["batch"]), type=ir.TensorType(timestep)))
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": OPSET, DOMAIN: 1}, name="forms")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, *inputs: Tensor) -> list[Tensor]:
    session = open_session(ir.to_proto(model).SerializeToString(), session_options(1))
    return [torch.from_numpy(y) for y in session.run(None, {f"x{i}": x.numpy() for i, x in enumerate(inputs)})]


def tokens(width: int = 96, rank: int = 3) -> Tensor:
    torch.manual_seed(5)
    x = torch.randn(*(2, 7, width)[-rank:]) if rank == 3 else torch.randn(2, width)
    x[..., 1] *= 30
    return x


def check(layer: QuantLinear, folder: Path, kernel: str | None, rank: int = 3, tolerance: float = SAME) -> None:
    model = graph_of(layer, rank=rank)
    (planned,) = lower(model, {layer.site: layer})
    x = tokens(layer.in_features, rank)
    (y,) = run(model, x)
    assert relative(y, layer(x)) < tolerance
    ir.save(model, folder / "model.onnx")
    kernels = kernels_of(folder / "model.onnx")
    if planned.kind == "integer":
        assert all(kernels[product] in INTEGER_KERNELS for product in planned.coded)
        joined = layer.activation.granularity == "group"  # a branch that reads integers has no product of its own there
        assert (planned.inner is not None) == (layer.rank > 0 and layer.branch == "integer" and not joined)
        assert planned.inner is None or kernels[planned.inner] in INTEGER_KERNELS
    else:
        made_by = kernels.get(planned.product) or kernels[planned.output]  # the block kernel takes the bias in
        assert made_by == kernel


@pytest.mark.parametrize("activation", [TOKEN, TENSOR], ids=["token", "tensor"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_shared_table_of_any_width_runs_as_an_integer_kernel(
    bits: int, activation: ActivationFormat, tmp_path: Path
) -> None:
    codebook = "uniform" if bits == 8 else "twin_log_shared"
    check(layer_of(bits=bits, activation=activation, codebook=codebook), tmp_path, None)


@pytest.mark.parametrize(
    ("codebook", "bits"),
    [("nf", 3), ("nf", 4), ("lloyd_max", 4), ("lloyd_max", 5), ("apot", 4), ("apot", 7), ("e2m1", 4)],
)
def test_every_codebook_of_one_table_runs_as_an_integer_kernel(codebook: str, bits: int, tmp_path: Path) -> None:
    check(layer_of(bits=bits, codebook=codebook), tmp_path, None)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("width", [96, 91], ids=["even", "odd"])
def test_a_table_a_row_runs_as_an_integer_kernel(bits: int, width: int, tmp_path: Path) -> None:
    check(layer_of(width, bits=bits, codebook="twin_log"), tmp_path, None)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("codebook", ["uniform", "twin_log_shared", "lloyd_max"])
def test_group_multipliers_run_as_an_integer_kernel(bits: int, codebook: str, tmp_path: Path) -> None:
    check(layer_of(bits=bits, codebook=codebook, group_size=32), tmp_path, None)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_activations_of_fewer_bits_stay_in_their_range(bits: int, granularity: Any, tmp_path: Path) -> None:
    check(layer_of(activation=ActivationFormat(bits, granularity)), tmp_path, None)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize(("bits", "grid"), [(2, "midrise"), (4, "midrise"), (7, "midrise"), (4, "symmetric")])
def test_clipped_and_midrise_activations_run_as_an_integer_kernel(
    bits: int, grid: Any, granularity: Any, dimensions: int, tmp_path: Path
) -> None:
    check(layer_of(activation=ActivationFormat(bits, granularity, grid, clip=0.6)), tmp_path, None, dimensions)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (8, 0.7), (4, 1.0), (4, 0.7)])
def test_unsigned_activations_run_as_an_integer_kernel(bits: int, clip: float, dimensions: int, tmp_path: Path) -> None:
    # the inputs of `check` go far below -0.3: both sides saturate alike
    layer = layer_of(activation=ActivationFormat(bits, "token", "unsigned", clip, shift=0.3))
    layer.fold_shift()
    check(layer, tmp_path, None, dimensions)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(
    ("bits", "grid", "clip", "size"),
    [(8, "symmetric", 1.0, 32), (4, "symmetric", 0.7, 24), (4, "midrise", 1.0, 16), (7, "midrise", 0.7, 96)],
)
def test_a_scale_a_group_runs_as_an_integer_kernel_for_each_group(
    bits: int, grid: Any, clip: float, size: int, rank: int, dimensions: int, tmp_path: Path
) -> None:
    form = ActivationFormat(bits, "group", grid, clip, group_size=size)
    for branch in ("integer", "float") if rank else ("integer",):
        settings: dict[str, Any] = {"group_size": 32, "rank": rank, "branch": branch, "bias": dimensions == 3}
        layer = layer_of(activation=form, **settings)
        check(layer, tmp_path, None, dimensions, tolerance=3e-6)  # float32 sums of 96 products in another order
        integer = [kind for kind in kernels_of(tmp_path / "model.onnx").values() if kind in INTEGER_KERNELS]
        assert len(integer) == 96 // size


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["float", "int"])
@pytest.mark.parametrize(("bits", "grid"), [(8, "symmetric"), (4, "midrise")])
def test_a_scale_a_timestep_bin_runs_as_an_integer_kernel(
    bits: int, grid: Any, kind: str, dimensions: int, tmp_path: Path
) -> None:
    form = ActivationFormat(bits, "timestep", grid, edges=(700.5, 300.0))
    layer = layer_of(activation=form)
    model = graph_of(layer, rank=dimensions, timestep=ir.DataType.FLOAT if kind == "float" else ir.DataType.INT64)
    (planned,) = lower(model, {layer.site: layer})
    session, x = open_session(ir.to_proto(model).SerializeToString(), session_options(1)), tokens(rank=dimensions)
    outputs = []
    for timestep in (1000, 701, 700, 300, 299, 0):
        layer.timestep = torch.tensor([timestep, 0], dtype=torch.float32 if kind == "float" else torch.int64)
        (y,) = session.run(None, {"x0": x.numpy(), "timestep": layer.timestep.numpy()})
        assert relative(torch.from_numpy(y), layer(x)) < SAME
        outputs.append(torch.from_numpy(y))
    same = [torch.equal(before, after) for before, after in itertools.pairwise(outputs)]
    assert same == [True, False, True, False, True]
    ir.save(model, tmp_path / "model.onnx")
    assert kernels_of(tmp_path / "model.onnx")[planned.product] in INTEGER_KERNELS


@pytest.mark.parametrize("activation", [TOKEN, TENSOR], ids=["token", "tensor"])
def test_an_input_of_two_dimensions_does_not_become_a_float_gemm(activation: ActivationFormat, tmp_path: Path) -> None:
    check(layer_of(activation=activation), tmp_path, None, rank=2)


def test_integer_products_do_not_saturate_on_any_processor(tmp_path: Path) -> None:
    # 127 * 255 twice is beyond 16 bits, in which x86 processors without VNNI add pairs of products
    layer = layer_of(256, bits=8, codebook="uniform")
    layer.codes.copy_(torch.full_like(layer.codes, 127))
    model = graph_of(layer)
    lower(model, {layer.site: layer})
    x = torch.ones(2, 3, 256)
    (y,) = run(model, x)
    assert relative(y, layer(x)) < SAME


def test_a_zero_token_gives_the_bias() -> None:
    layer = layer_of()
    model = graph_of(layer)
    lower(model, {layer.site: layer})
    (y,) = run(model, torch.zeros(2, 3, 96))
    assert layer.bias is not None
    assert torch.equal(y, layer.bias.expand(2, 3, -1))


@pytest.mark.parametrize("group", [16, 32])
def test_even_levels_with_float_group_scales_run_as_the_block_kernel(group: int, tmp_path: Path) -> None:
    layer = layer_of(codebook="uniform", activation=FLOAT, group_size=group, float_group_scales=True)
    check(layer, tmp_path, "MatMulNBits", tolerance=3e-6)  # float32 sums of 96 products in another order


@pytest.mark.parametrize(
    "settings",
    [
        {"codebook": "twin_log_shared"},
        {"codebook": "twin_log"},
        {"codebook": "e2m1", "group_size": 16, "float_group_scales": True},
        {"codebook": "uniform", "bits": 3, "group_size": 32, "float_group_scales": True},
        {"codebook": "uniform", "group_size": 24, "float_group_scales": True},
        {"codebook": "uniform", "bits": 8},
    ],
    ids=["shared", "row", "fp4 groups", "three bits", "odd groups", "eight bits"],
)
def test_other_weight_only_forms_are_dequantized_once_at_load(settings: dict[str, Any], tmp_path: Path) -> None:
    check(layer_of(activation=FLOAT, bias=False, **settings), tmp_path, "MatMul", tolerance=3e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"codebook": "twin_log_shared"},
        {"codebook": "twin_log", "bits": 3},
        {"codebook": "lloyd_max", "bits": 3, "group_size": 32, "float_group_scales": True},
        {"codebook": "uniform", "bits": 8, "rank": 8},
    ],
    ids=["shared", "row", "groups", "eight bits"],
)
def test_fp8_weights_of_float_inputs_are_dequantized_once_at_load(settings: dict[str, Any], tmp_path: Path) -> None:
    check(layer_of(activation=FLOAT, carrier=FLOAT8, bias=False, **settings), tmp_path, "MatMul", tolerance=3e-6)


def test_even_fp8_levels_run_as_the_block_kernel(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"codebook": "uniform", "group_size": 32, "float_group_scales": True}
    check(layer_of(activation=FLOAT, carrier=FLOAT8, **settings), tmp_path, "MatMulNBits", tolerance=3e-6)


def test_a_product_of_fp8_numbers_is_refused_in_one_line() -> None:
    layer = layer_of(activation=ActivationFormat(8, "token", "float8_e4m3"), carrier=FLOAT8)
    with pytest.raises(
        DitqError, match="site: onnxruntime-cpu has no product of float8_e4m3 numbers; set carrier: int8"
    ) as caught:
        lower(graph_of(layer), {layer.site: layer})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("activation", [ActivationFormat(4, "token"), TENSOR], ids=["token", "tensor"])
@pytest.mark.parametrize("branch", ["integer", "float"])
def test_a_low_rank_branch_beside_an_integer_product(
    branch: Any, activation: ActivationFormat, dimensions: int, tmp_path: Path
) -> None:
    layer = layer_of(activation=activation, group_size=32, rank=8, branch=branch, bias=dimensions == 3)
    # float32 sums of 96 products in another order
    check(layer, tmp_path, None, dimensions, tolerance=SAME if branch == "integer" else 3e-6)


@pytest.mark.parametrize("codebook", ["uniform", "twin_log_shared"])
def test_a_low_rank_branch_of_a_weight_only_layer(codebook: str, tmp_path: Path) -> None:
    blocks = {"group_size": 32, "float_group_scales": True} if codebook == "uniform" else {}
    layer = layer_of(codebook=codebook, activation=FLOAT, rank=8, **blocks)
    check(layer, tmp_path, "MatMulNBits" if blocks else "MatMul", tolerance=3e-6)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", ["full", "blocks", "regular", "outlier", "learned"])
def test_rotations_agree_with_torch(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    rotation = {
        "full": lambda: hadamard_rotation(96),
        "blocks": lambda: block_hadamard_rotation(96),
        "regular": lambda: regular_rotation(96, 16),
        "outlier": lambda: outlier_rotation(torch.randn(64, 96), block=32, steps=4),
        "learned": lambda: refine(hadamard_rotation(96), lambda turned: turned.apply(torch.ones(96)).abs().amax(), 2)[
            0
        ],
    }[kind]()
    transform = InputTransform(torch.rand(96) + 0.5, torch.randn(96), [(0, 96, rotation)])
    layer = layer_of(activation=FLOAT, transform=transform)
    model = graph_of(layer, rank=rank)
    lower(model, {layer.site: layer})
    x = tokens(rank=rank)
    assert relative(run(model, x)[0], layer(x)) < 3e-6


def part_transform() -> InputTransform:
    return InputTransform(torch.rand(96) + 0.5, None, [(32, 96, hadamard_rotation(64))])


def test_a_rotation_of_a_part_leaves_the_rest_alone() -> None:
    layer = layer_of(activation=FLOAT, transform=part_transform())
    model = graph_of(layer)
    lower(model, {layer.site: layer})
    assert relative(run(model, tokens())[0], layer(tokens())) < 3e-6


def test_a_rotation_of_one_side_of_a_concatenation_needs_no_split() -> None:
    layer = layer_of(activation=FLOAT, transform=part_transform())
    model = graph_of(layer, joined=(32, 64))
    lower(model, {layer.site: layer})
    x = tokens()
    assert "Split" not in {node.op_type for node in model.graph}
    assert relative(run(model, x[..., :32].contiguous(), x[..., 32:].contiguous())[0], layer(x)) < 3e-6


def test_layers_of_one_input_share_its_rotation_and_its_quantization() -> None:
    layers = [
        layer_of(site=site, transform=InputTransform(rotations=[(0, 96, hadamard_rotation(96))]))
        for site in ("query", "key", "value")
    ]
    model = graph_of(*layers)
    lower(model, {layer.site: layer for layer in layers})
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 1
    assert kinds.count("MatMul") == 2 + 3  # two factors of one rotation, three weights
    for y, layer in zip(run(model, tokens()), layers, strict=True):
        # a rotated value next to the middle between two integers may round the other way: 1/127 of a token's maximum
        assert relative(y, layer(tokens())) < 1e-3
