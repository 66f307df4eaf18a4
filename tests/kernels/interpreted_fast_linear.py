"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: FastLinear against the QuantLinear that it is made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ditq.kernels.decode import decode_into
from ditq.kernels.fast_linear import FastLinear, on_device, why_no_kernel
from ditq.kernels.on_gpu import to_gpu
from ditq.kernels.online import Online
from ditq.kernels.storage import carrier_meaning, store, weight_meaning
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.numerics.carrier import E4M3
from ditq.numerics.rotation import block_hadamard_rotation, hadamard_rotation, outlier_rotation
from tests.export.quantized import quantized, relative
from tests.kernels import interpreter

interpreter.install()
TOKEN, FLOAT = ActivationFormat(8, "token"), ActivationFormat()


def linear(width: int = 128, rows: int = 80) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, rows)


def layer(width: int = 128, **settings: Any) -> QuantLinear:
    return quantized(linear(width), "site", **settings).requires_grad_(False)


def check(made: QuantLinear, dtype: torch.dtype = torch.bfloat16, moved: float = 4e-3) -> FastLinear:
    """Outputs agree up to bfloat16's rounding of them (2^-9) and integers next to a tie, which a last bit moves by one."""
    x = torch.randn(2, 7, made.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    fast = FastLinear(made)
    with torch.no_grad():
        found, expected = fast(x), made(x.float())
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative(found.float(), expected) < moved
    return fast


BLOCKS = InputTransform(rotations=[(0, 128, block_hadamard_rotation(128, 64, seed=1))])


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 64), (4, None), (4, 64), (5, 64), (8, None)])
def test_token_linears(bits: int, group_size: int | None) -> None:
    made = layer(bits=bits, transform=BLOCKS, group_size=group_size)
    assert (made.multiplier is not None) == (group_size is not None and bits < 8)
    check(made)


@pytest.mark.parametrize("codebook", ["twin_log", "uniform"])
def test_codebooks_with_tables_of_other_kinds(codebook: str) -> None:
    check(layer(codebook=codebook))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_alone(bits: int) -> None:
    check(layer(bits=bits, activation=FLOAT, codebook="uniform", group_size=64, float_group_scales=True), moved=8e-3)
    check(layer(bits=bits, activation=FLOAT), moved=8e-3)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, None), (5, 64)])
def test_decoded_weights_give_the_same_to_the_bit(bits: int, group_size: int | None) -> None:
    made = layer(bits=bits, transform=BLOCKS, group_size=group_size)
    x = torch.randn(7, made.in_features, generator=torch.Generator().manual_seed(1))
    coded, decoded = FastLinear(made), FastLinear(made, decoded=True)
    assert decoded.stored.bits == 8
    assert torch.equal(decoded(x), coded(x))


def test_a_whole_model_is_decoded_but_for_weights_alone() -> None:
    model = to_gpu(nn.Sequential(layer(), layer(activation=FLOAT)), torch.device("cpu"), decoded=True)
    assert [linear.stored.bits for linear in model.modules() if isinstance(linear, FastLinear)] == [8, 4]


@pytest.mark.parametrize("branch", ["integer", "float"])
def test_a_low_rank_branch(branch: Any) -> None:
    check(layer(rank=4, branch=branch, transform=BLOCKS), moved=8e-3)
    check(layer(rank=4, branch=branch, activation=FLOAT), moved=8e-3)


def test_a_transform_that_the_kernel_has_no_form_of_is_computed_by_torch() -> None:
    rotation = outlier_rotation(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), 64, steps=2)
    fast = check(layer(transform=InputTransform(rotations=[(0, 128, rotation)])))
    assert fast.input.transform is not None


def test_transforms_in_the_kernel() -> None:
    full = InputTransform(torch.rand(128) + 0.5, torch.randn(128), [(0, 128, hadamard_rotation(128))])
    assert check(layer(transform=full), moved=8e-3).input.transform is None  # what is rotated is rounded once more


@pytest.mark.parametrize("form", [
    ActivationFormat(4, "token", "midrise", clip=0.9), ActivationFormat(4, "group", group_size=64),
    ActivationFormat(8, "tensor"),
])  # fmt: skip
def test_formats_of_the_input(form: ActivationFormat) -> None:
    check(layer(activation=form, transform=BLOCKS))


def test_layers_that_read_their_input_alike_share_the_plan() -> None:
    plans: dict[str, Online] = {}
    makes = [FastLinear(layer(transform=BLOCKS, bits=bits), plans) for bits in (3, 4)]
    other = FastLinear(layer(), plans)
    first, second, third = (fast.input.plan for fast in (*makes, other))
    assert first is second and third is not first and len(plans) == 2


def test_moving_a_model_to_bfloat16_leaves_the_scales_alone() -> None:
    fast = FastLinear(layer())
    nn.Sequential(fast).to(torch.bfloat16)
    assert fast.stored.scale.dtype == torch.float32


def test_a_transform_on_the_device_is_the_same_transform() -> None:
    x = torch.randn(3, 128)
    full = InputTransform(torch.rand(128) + 0.5, torch.randn(128), [(0, 128, hadamard_rotation(128))])
    assert torch.equal(on_device(full, torch.device("cpu"))(x), full(x))


@pytest.mark.parametrize(("bits", "columns"), [(2, 128), (3, 200), (3, 128), (4, 128), (8, 200)])
def test_weights_written_out_in_full(bits: int, columns: int) -> None:
    group = 64 if columns == 128 else None
    stored = [
        store(layer(columns, bits=bits, group_size=group).code())
        if bits < 8
        else FastLinear(layer(columns, bits=8)).stored,
        FastLinear(
            layer(
                columns,
                bits=bits,
                codebook="uniform",
                activation=FLOAT,
                group_size=group,
                float_group_scales=group is not None,
            )
        ).stored,
    ]
    for weight in stored:
        carriers, floats = torch.zeros(80, columns, dtype=torch.int8), torch.zeros(80, columns, dtype=torch.bfloat16)
        decode_into(weight, floats)
        expected = weight_meaning(weight)
        assert torch.equal(floats, expected.to(torch.bfloat16))
        decode_into(weight, carriers)
        assert torch.equal(carriers, carrier_meaning(weight))


def test_what_no_kernel_can_run_is_told_with_what_to_do() -> None:
    assert why_no_kernel(layer()) is None
    timed = layer(activation=ActivationFormat(8, "timestep", edges=(500.0,)))
    assert "set activation: token" in (why_no_kernel(timed) or "")
    unsigned = layer(activation=ActivationFormat(8, "token", "unsigned", shift=0.1))
    assert "unsigned" in (why_no_kernel(unsigned) or "")
    assert "set group_size: 64" in (why_no_kernel(layer(group_size=16)) or "")
    assert "set group_size: 32" in (why_no_kernel(layer(96, group_size=48)) or "")
    assert "set group_size: 0" in (why_no_kernel(layer(48, group_size=24)) or "")
    with pytest.raises(ValueError, match="site: activations with a scale a timestep"):
        FastLinear(timed)
    float8 = layer(activation=FLOAT)
    assert float8.table is not None
    float8.table = float8.table.float().to(E4M3)
    assert why_no_kernel(float8, 90) is None and "compute capability 8.9" in (why_no_kernel(float8, 80) or "")
