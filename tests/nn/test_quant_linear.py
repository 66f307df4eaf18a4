"""QuantLinear computes what its codes, scales and formats mean, for every form that a recipe can ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ditq.nn import QuantLinear
from ditq.nn.input_transform import InputTransform
from ditq.nn.modes import exporting, rounded_by
from ditq.nn.quant_linear import ActivationFormat, Branch
from ditq.numerics.carrier import FLOAT8, INT8, Carrier
from ditq.numerics.codebook import CODEBOOKS
from ditq.numerics.low_rank import fit_low_rank
from ditq.numerics.rotation import block_hadamard_rotation, hadamard_rotation, outlier_rotation
from ditq.numerics.rounding import round_nearest
from ditq.numerics.weight_code import WeightCode

IN, OUT, TOKENS = 48, 20, 30


@dataclass(frozen=True)
class Form:
    """One way to code a linear."""

    codebook: str = "uniform"
    bits: int = 4
    group: int = 0
    activation: ActivationFormat = ActivationFormat()
    transform: bool = False
    bias: bool = True
    rank: int = 0
    branch: Branch = "integer"
    carrier: Carrier = INT8


FP8 = ActivationFormat(8, "token", "float8_e4m3")
DYNAMIC, STATIC = ActivationFormat(8, "token"), ActivationFormat(8, "tensor")
FORMS = {
    **{f"w{bits}a16 {name}": Form(name, bits) for bits in (2, 3, 5, 8) for name in ("uniform", "twin_log", "twin_log_shared")
       if bits < 8 or name == "uniform"},
    "w4a16 groups": Form(group=16),
    "w4a8 groups": Form(group=16, activation=DYNAMIC),
    "w8a8 groups": Form(bits=8, group=16, activation=DYNAMIC),
    "w4a8": Form("twin_log_shared", 4, activation=DYNAMIC),
    "w3a6": Form("twin_log", 3, activation=ActivationFormat(6, "token")),
    "w4a4": Form(activation=ActivationFormat(4, "token")),
    "w4a4 mid-rise, clipped": Form(activation=ActivationFormat(4, "token", "midrise", 0.8), rank=3, transform=True),
    "w4a6 clipped": Form(activation=ActivationFormat(6, "token", clip=0.7)),
    "w4a8 unsigned": Form(activation=ActivationFormat(8, "token", "unsigned", shift=0.5), bias=False),
    "w4a4 unsigned, clipped, rank 3": Form(activation=ActivationFormat(4, "token", "unsigned", 0.8, shift=0.5), rank=3),
    "w4a4 unsigned, rank 3 in float": Form(
        activation=ActivationFormat(4, "token", "unsigned", shift=0.5), rank=3, branch="float"
    ),
    "w4a8 scale a group": Form(activation=ActivationFormat(8, "group", group_size=16)),
    "w4a4 scale a group, mid-rise": Form(
        group=16, activation=ActivationFormat(4, "group", "midrise", 0.8, group_size=8), rank=3, transform=True
    ),
    "w4a4 scale a group, rank 3 in float": Form(
        activation=ActivationFormat(4, "group", group_size=24), rank=3, branch="float", bias=False
    ),
    "w4a8 static": Form(activation=STATIC),
    "w4a5 static, mid-rise": Form(activation=ActivationFormat(5, "tensor", "midrise")),
    "w4a8 transformed": Form(activation=DYNAMIC, transform=True),
    "w4a16 transformed": Form(transform=True, bias=False),
    "w8a8": Form(bits=8, activation=DYNAMIC),
    "w4a8 rank 3": Form(activation=DYNAMIC, rank=3),
    "w4a4 rank 3 in float": Form(activation=ActivationFormat(4, "token"), rank=3, branch="float", transform=True),
    "w4a8 static rank 3": Form(group=16, activation=STATIC, rank=3),
    "w4a8 static rank 3 in float": Form(activation=STATIC, rank=3, branch="float"),
    "w4a16 groups rank 3": Form(group=16, rank=3),
    "w4a8 fp8": Form("twin_log_shared", activation=FP8, carrier=FLOAT8),
    "w3a8 fp8 groups": Form("lloyd_max", 3, group=16, activation=FP8, transform=True, carrier=FLOAT8),
    "w4a8 fp8 a table a row, rank 3 in float": Form(
        "twin_log", activation=FP8, rank=3, branch="float", carrier=FLOAT8
    ),
    "w8a8 fp8": Form(bits=8, activation=FP8, carrier=FLOAT8),
    "w4a16 fp8 groups": Form("nf", group=16, carrier=FLOAT8),
    "w8a16 fp8": Form(bits=8, bias=False, carrier=FLOAT8),
}  # fmt: skip


def _transform(x: Tensor) -> InputTransform:
    """Scale, shift, a rotation made by construction and one that was fitted to data."""
    generator = torch.Generator().manual_seed(2)
    rotations = [(0, 32, hadamard_rotation(32, seed=1)), (32, 48, outlier_rotation(x[:, 32:48], block=16))]
    return InputTransform(torch.rand(IN, generator=generator) + 0.5, torch.randn(IN, generator=generator), rotations)


def _bias(form: Form) -> Tensor | None:
    """Of the linear, before anything is folded into it."""
    return torch.randn(OUT, generator=torch.Generator().manual_seed(4)) if form.bias else None


def _made(form: Form, seed: int = 0) -> tuple[QuantLinear, WeightCode, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(OUT, IN, generator=generator), torch.randn(TOKENS, IN, generator=generator) * 2
    grouped = {"group_size": form.group, "float_group_scales": form.activation.bits == 16} if form.group else {}
    low_rank = fit_low_rank(weight, None, form.rank) if form.rank else None
    remainder = weight if low_rank is None else weight - low_rank.product()
    fit = CODEBOOKS[form.codebook](remainder, form.bits, carrier=form.carrier, **grouped)
    code = round_nearest(remainder, fit)
    code = replace(code, low_rank=low_rank)
    static = None
    if form.activation.granularity == "tensor":
        static = form.activation.scale(x.abs().max() * 0.9)  # some values are clipped
    transform = _transform(x) if form.transform else None
    layer = QuantLinear("site", code, _bias(form), form.activation, static, transform, form.codebook, form.branch)
    if form.activation.shift:
        layer.fold_shift()
    return layer, code, x


def _expected(layer: QuantLinear, code: WeightCode, x: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, in float64: transform, round to the activation's grid, multiply by the decoded weight."""
    x = x.double()
    if layer.transform is not None:
        assert layer.transform.inverse_scale is not None and layer.transform.shift is not None
        x = x * layer.transform.inverse_scale.double() - layer.transform.shift.double()
        for start, stop, rotation in layer.transform.rotations:
            x[:, start:stop] = x[:, start:stop] @ rotation.matrix()
    form, exact = layer.activation, x
    if form.granularity != "none":
        top = 2 ** (
            form.bits - 1
        )  # cells on each side of zero, each with its level in the middle; else levels at 0, 1, ..
        if form.granularity in ("token", "group"):
            size = form.group_size or x.shape[-1]
            largest = torch.stack([part.abs().amax(-1) for part in x.split(size, -1)], -1)
            step = form.clip * largest.repeat_interleave(size, -1) / (top if form.grid == "midrise" else top - 1)
        else:
            assert layer.activation_scale is not None
            step = layer.activation_scale.double()
        if form.grid == "unsigned":
            step = form.clip * (x.amax(-1, keepdim=True) + form.shift) / (2 * top - 1)
            x = ((x + form.shift) / step).round().clamp(0, 2 * top - 1) * step - form.shift
        elif form.grid == "float8_e4m3":
            step = form.clip * largest.repeat_interleave(size, -1) / 448
            x = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).double() * step
        elif form.grid == "midrise":
            x = ((x / step - 0.5).round().clamp(-top, top - 1) + 0.5) * step
        else:
            x = (x / step).round().clamp(1 - top, top - 1) * step
    y = x @ code.decode().double().T
    if layer.branch == "float":
        branch = (layer.up.double() * layer.branch_scale.double()) @ layer.down.double()
        y = y + (exact - x) @ branch.T  # the branch reads the input as it was
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("name", FORMS)
def test_forward_is_what_the_codes_mean(name: str) -> None:
    layer, code, x = _made(FORMS[name])
    expected, found = _expected(layer, code, x, _bias(FORMS[name])), layer(x)
    # Rounding to the grid is done on float32 values: a value within 2^-22 of a tie may fall to the other side, which none of
    # these does; what is left is float32 rounding of a sum of 48 products.
    limit = 48**0.5 * torch.finfo(torch.float32).eps * 4
    assert (found - expected).norm() < limit * expected.norm()
    assert found.shape == (TOKENS, OUT) and found.dtype == torch.float32


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_made_again_from_its_description_gives_the_same_bits(name: str) -> None:
    layer, _, x = _made(FORMS[name])
    state = {f"site.{key}": value for key, value in layer.state_dict().items()}
    again = QuantLinear.from_spec(layer.spec(), state)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert again.spec() == layer.spec() and str(again) == str(layer)


@pytest.mark.parametrize("name", FORMS)
def test_the_carrier_is_of_its_dtype_and_times_its_scales_the_decoded_weight(name: str) -> None:
    layer, code, _ = _made(FORMS[name])
    assert layer.carrier().dtype == FORMS[name].carrier.dtype
    assert torch.equal(layer.weight(), code.decode())


def test_codes_take_the_bits_that_they_say() -> None:
    sizes = {bits: _made(Form(bits=bits))[0].codes.nbytes for bits in (2, 3, 4, 5, 8)}
    assert sizes == {bits: OUT * IN * bits // 8 for bits in sizes}


def test_inputs_of_any_shape_and_half_precision_come_back_as_they_came() -> None:
    layer, _, x = _made(FORMS["w4a8"])
    assert torch.equal(layer(x.view(5, 6, IN)), layer(x).view(5, 6, OUT))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())


def test_a_token_of_zeros_gives_the_bias() -> None:
    layer, _, _ = _made(FORMS["w4a8"])
    assert layer.bias is not None
    assert torch.equal(layer(torch.zeros(1, IN))[0], layer.bias)


def test_loading_other_weights_forgets_the_old_ones() -> None:
    layer, _, x = _made(FORMS["w4a8"])
    other, _, _ = _made(FORMS["w4a8"], seed=1)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_integer_products_with_a_scale_a_group_are_refused() -> None:
    weight = torch.randn(OUT, IN)
    code = round_nearest(weight, CODEBOOKS["uniform"](weight, 4, group_size=16, float_group_scales=True))
    with pytest.raises(ValueError, match="group multipliers"):
        QuantLinear("site", code, None, DYNAMIC)
    with pytest.raises(ValueError, match="do not divide into groups of 20"):
        QuantLinear("site", code, None, ActivationFormat(8, "group", group_size=20))
    with pytest.raises(ValueError, match="calibrated scale"):
        QuantLinear("site", round_nearest(weight, CODEBOOKS["uniform"](weight, 4)), None, STATIC)


def test_exporting_is_over_when_its_block_is_even_after_an_error() -> None:
    layer, _, x = _made(FORMS["w4a8"])
    before = layer(x)
    with pytest.raises(RuntimeError, match="only in exported graphs"), exporting(layer):
        layer(x)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    "activation",
    [
        DYNAMIC,
        STATIC,
        ActivationFormat(4, "token", "midrise", 0.8),
        ActivationFormat(4, "group", "midrise", group_size=16),
    ],
)
def test_given_integers_take_the_place_of_the_nearest_ones(activation: ActivationFormat) -> None:
    layer, _, x = _made(Form(activation=activation, transform=True, rank=3))
    before = layer(x)
    with rounded_by(layer, lambda site, steps: steps.round()):
        assert torch.equal(layer(x), before)
    with rounded_by(layer, lambda site, steps: steps.floor()):
        floored = layer(x)
    assert torch.equal(layer(x), before)
    assert layer.transform is not None
    steps, step = layer.in_steps(layer.transform(x))
    difference = ((steps.floor() - steps.round()) * step).double() @ layer.weight().double().T
    assert (floored - before - difference).abs().max() < 1e-5 * before.abs().max()


# --- the transform in front


def test_a_transform_rotates_only_its_ranges() -> None:
    x = torch.randn(7, IN, generator=torch.Generator().manual_seed(0))
    rotation = block_hadamard_rotation(16, 16)
    transform = InputTransform(rotations=[(16, 32, rotation)])
    found = transform(x)
    assert torch.equal(found[:, :16], x[:, :16]) and torch.equal(found[:, 32:], x[:, 32:])
    expected = x[:, 16:32].double() @ rotation.matrix()
    assert (found[:, 16:32] - expected).abs().max() < 1e-6 * expected.abs().max() * 16


@pytest.mark.parametrize("ranges", [[(0, 16), (8, 24)], [(0, 15)], [(0, 32)]])
def test_ranges_that_overlap_or_do_not_fit_are_refused(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="overlaps another or does not fit"):
        InputTransform(rotations=[(start, stop, block_hadamard_rotation(16, 16)) for start, stop in ranges])


def test_multiply_adds_of_a_transform_by_hand() -> None:
    transform = InputTransform(torch.ones(IN), torch.zeros(IN), [(0, 32, block_hadamard_rotation(32, 16))])
    assert transform.multiply_adds() == IN + IN + 32 * 16
