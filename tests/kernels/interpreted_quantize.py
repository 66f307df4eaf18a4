"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: what stands in front of a product, against its meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.kernels.online import Cut, Online, online
from ditq.kernels.operators import quantized
from ditq.kernels.quantize import Before, before_meaning, launch, number_type, quantize_meaning
from ditq.nn import ActivationFormat, InputTransform
from ditq.numerics.activation_format import Grid
from ditq.numerics.carrier import E4M3
from ditq.numerics.rotation import (
    BlockStep,
    Rotation,
    block_hadamard_rotation,
    hadamard_rotation,
    outlier_rotation,
    regular_rotation,
)
from tests.kernels import interpreter

interpreter.install()
TOKEN = ActivationFormat(8, "token")


def tokens(count: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    x: Tensor, transform: InputTransform | None, form: ActivationFormat = TOKEN, before: Before = Before(),  # noqa: B008
    calibrated: Tensor | None = None, a_sample: int = 3, parts: float = 2.0**-15,
) -> None:  # fmt: skip
    """Every integer is a rounding of the exact value, and scales and transformed inputs agree. Outputs are poisoned.

    parts: what float32 loses on the way, with a rounding to bfloat16 that a last bit of it may move.
    """
    plan = online(transform, form, calibrated, x.shape[1])
    assert plan is not None
    moved, steps, scale = quantize_meaning(x, a_sample, before, transform, form, calibrated)
    size = moved.abs().amax(1, keepdim=True)
    kept = torch.full(x.shape, torch.nan)
    if steps is None or scale is None:
        launch(x, a_sample, before, plan, None, None, kept)
        assert bool(((kept - moved).abs() <= 2 * parts * size).all())
        return
    q = torch.full(x.shape, -128, dtype=torch.int8).view(number_type(form)) if form.grid == "float8_e4m3" else None
    q = torch.full(x.shape, -128, dtype=torch.int8) if q is None else q
    groups = (x.shape[1] // form.group_size,) if form.granularity == "group" else ()
    scales = torch.full((len(x), *groups), torch.nan)
    launch(x, a_sample, before, plan, q, scales, kept)
    unit = form.unit(scale)
    each = unit[:, :: form.group_size] if groups else unit.expand(len(x), 1)[:, 0]
    assert torch.allclose(scales.double(), each.double(), rtol=8 * parts, atol=0)
    assert bool(((kept - moved).abs() <= 2 * parts * size).all())
    n = form.rounded_from(q.double())
    spacing = 1.0 if form.grid != "float8_e4m3" else _spacing(n)
    slack = 16 * parts * form.maximum
    assert bool(((steps - n).abs() <= spacing * (0.5 + slack)).all()), float(((steps - n).abs() / spacing).max())


def _spacing(numbers: Tensor) -> Tensor:
    """Between FP8 numbers next to these: three bits of mantissa, subnormal below 2^-6."""
    return 2.0 ** (numbers.abs().clamp_min(2.0**-6).log2().floor() - 3)


def rotated(width: int, rotation: Rotation, start: int = 0) -> InputTransform:
    return InputTransform(rotations=[(start, start + rotation.size, rotation)])


@pytest.mark.parametrize("width", [24, 64, 1152, 4608])
def test_plain_tokens(width: int) -> None:
    check(tokens(5, width), None)


@pytest.mark.parametrize("width", [64, 192, 1152])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hadamard_blocks(width: int, dtype: torch.dtype) -> None:
    check(tokens(3, width, dtype), rotated(width, block_hadamard_rotation(width, 64, seed=1)))


@pytest.mark.parametrize("width", [96, 768, 1152, 3072])
def test_full_hadamard_rotations(width: int) -> None:
    check(tokens(2, width), rotated(width, hadamard_rotation(width, seed=1)))


def test_blocks_on_a_range_of_the_channels() -> None:
    check(tokens(3, 320), rotated(320, block_hadamard_rotation(256, 64, seed=1), start=64))


def test_regular_blocks_with_scale_and_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.rand(192, generator=generator) + 0.5, torch.randn(192, generator=generator)
    transform = InputTransform(scale, shift, [(0, 192, regular_rotation(192, 64))])
    check(tokens(3, 192), transform)
    check(tokens(3, 192), InputTransform(scale, shift))


def test_matrices_that_are_not_of_signs() -> None:
    matrix = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    check(tokens(3, 192, torch.float32), rotated(192, Rotation(192, (BlockStep(matrix),))))


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
def test_activation_rotation_and_rounding_in_one(activation: str) -> None:
    transform = rotated(256, block_hadamard_rotation(256, 64, seed=1))
    parts = 2.0**-12 if activation == "gelu_tanh" else 2.0**-15  # tanh.approx has 11 bits
    check(tokens(3, 256), transform, before=Before(activation=activation), parts=parts)


@pytest.mark.parametrize("rows", [16, 64], ids=["in chunks", "whole"])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_channels_behind_are_read_where_they_lie(rows: int, activation: str) -> None:
    """Two samples of three tokens: attention's answers and a feed-forward's hidden channels, both cut from wider rows."""
    plan = online(rotated(1280, block_hadamard_rotation(1280, 64, seed=1)), TOKEN, None, 1280)
    assert plan is not None
    x, hidden = tokens(6, 600, seed=1).view(2, 3, 600)[:, :, 88:], tokens(6, 800, seed=2).view(2, 3, 800)[:, :, 32:]
    joined = torch.cat((x, before_meaning(hidden, 3, Before(activation=activation))), -1).view(6, 1280)
    found = []
    for first, tail, before in ((x, hidden, Before(activation=activation)), (joined.bfloat16(), None, Before())):
        q, scales = torch.full((6, 1280), -128, dtype=torch.int8), torch.full((6,), torch.nan)
        launch(first, 3, before, plan, q, scales, None, Cut(rows, 1), tail)
        found.append((q.int(), scales))
    if activation:  # which is rounded to bfloat16 where it is not computed in the kernel
        assert float((found[0][0] - found[1][0]).abs().max()) <= 1
        assert torch.allclose(found[0][1], found[1][1], rtol=2e-2)
    else:
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_what_no_row_of_a_token_can_hold_is_copied_first() -> None:
    plan = online(None, TOKEN, None, 200)
    assert plan is not None
    x, hidden = tokens(3, 96, seed=1)[None], tokens(3, 104, seed=2)[None]
    found = []
    for first, tail in ((x, hidden), (torch.cat((x, hidden), -1)[0], None)):
        q, scales = torch.full((3, 200), -128, dtype=torch.int8), torch.full((3,), torch.nan)
        launch(first, 3, Before(), plan, q, scales, None, tail=tail)
        found.append((q, scales))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("gamma", [True, False])
@pytest.mark.parametrize("beta", [True, False])
def test_norm_modulation_rotation_and_rounding_in_one(gamma: bool, beta: bool) -> None:
    """Seven tokens of three samples: 3, 3 and 1."""
    pieces = [tokens(3, 192, seed=seed) if given else None for seed, given in ((1, gamma), (2, beta))]
    before = Before(norm=True, gamma=pieces[0], beta=pieces[1])
    check(tokens(7, 192) * 5 + 3, rotated(192, block_hadamard_rotation(192, 64, seed=1)), before=before)
    check(tokens(7, 192) * 5 + 3, None, ActivationFormat(), before=before)


@pytest.mark.parametrize("gamma", [True, False])
def test_channels_that_pad_a_token_far_from_zero_do_not_count(gamma: bool) -> None:
    """Three rows of 64 channels stand in sixteen: what a norm would make of the others is far larger than any channel."""
    before = Before(norm=True, gamma=tokens(1, 192, seed=1) if gamma else None)
    x = tokens(3, 192) + 40
    for transform in (rotated(192, block_hadamard_rotation(192, 64, seed=1)), None):
        check(x, transform, before=before)


FORMATS = [
    ActivationFormat(8, "token", clip=0.8),
    ActivationFormat(4, "token", "midrise"),
    ActivationFormat(6, "token", "midrise", clip=0.9),
    ActivationFormat(7, "token", "unsigned", shift=0.2),
    ActivationFormat(8, "token", "float8_e4m3"),
    ActivationFormat(8, "tensor"),
    ActivationFormat(4, "tensor", "midrise"),
]


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.grid}-{f.bits}-{f.granularity}-{f.clip}")
def test_every_grid(form: ActivationFormat) -> None:
    calibrated = torch.tensor(0.02) if form.granularity == "tensor" else None
    transform = rotated(128, block_hadamard_rotation(128, 64, seed=1))
    check(tokens(5, 128), transform, form, calibrated=calibrated)


@pytest.mark.parametrize("grid", ["symmetric", "midrise"])
def test_a_scale_a_group_of_channels(grid: str) -> None:
    check(tokens(5, 192), None, ActivationFormat(4, "group", grid, group_size=64))  # type: ignore[arg-type]


def test_a_token_of_zeros() -> None:
    check(torch.zeros(2, 128, dtype=torch.bfloat16), rotated(128, block_hadamard_rotation(128, 64, seed=1)))


def test_what_has_no_form_in_the_kernel_is_told() -> None:
    sample = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    outlier = rotated(256, outlier_rotation(sample, 128, steps=2))
    block = block_hadamard_rotation(64, 64)
    two = InputTransform(rotations=[(0, 64, block), (64, 128, block)])
    for transform, form, width in (
        (outlier, TOKEN, 256),
        (two, TOKEN, 128),
        (rotated(256, hadamard_rotation(192), start=64), TOKEN, 256),
        (rotated(256, hadamard_rotation(256)), ActivationFormat(8, "group", group_size=64), 256),
    ):
        assert online(transform, form, None, width) is None
    assert isinstance(online(None, TOKEN, None, 24), Online)


@pytest.mark.parametrize("grid", ["symmetric", "float8_e4m3"])
@pytest.mark.parametrize("behind", [0, 64, 40], ids=["alone", "rows of its own", "joined first"])
def test_fp8_numbers_of_an_attention_are_multiplied_as_they_are_read(behind: int, grid: Grid) -> None:
    """Alone, and with channels behind them that do and do not fill rows of their own."""
    width = 128 + behind
    transform = None if behind == 40 else rotated(width, block_hadamard_rotation(width, 64))
    form, times = ActivationFormat(8, "token", grid), torch.tensor([0.03])
    x = (20 * tokens(7, 128, torch.float32)).to(E4M3)
    if not behind:
        check(x, transform, form, Before(times=times))
        return
    tail = tokens(7, behind, seed=1)
    plan = online(transform, form, None, width)
    assert plan is not None
    joined = torch.cat(((x.float() * times).bfloat16(), tail), -1)
    found = []
    for first, last, before in ((x, tail, Before(times=times)), (joined, None, Before())):
        q, scales = torch.full((7, width), -128, dtype=torch.int8).view(number_type(form)), torch.full((7,), torch.nan)
        launch(first, 7, before, plan, q, scales, None, tail=last)
        found.append((q.float(), scales))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("shared", ["gamma", "beta"])
def test_a_modulation_of_all_samples_beside_one_of_each(shared: str) -> None:
    """What the operator gives for [1, 1, n] with [B, 1, n] is what it gives where both are written out for each sample."""
    plan, x = online(None, TOKEN, None, 64), tokens(15, 64).view(3, 5, 64)
    assert plan is not None
    pieces = {name: tokens(3, 64, seed=seed)[:, None] for seed, name in enumerate(("gamma", "beta"), 1)}
    pieces[shared] = pieces[shared][:1]

    def run(gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return quantized(
            x, gamma, beta, None, None, None, None, None, True, 1e-6, "", plan.a, plan.b, plan.size, plan.start, plan.stop,
            TOKEN.bits, TOKEN.granularity, TOKEN.grid, plan.limits, 0, True,
        )  # fmt: skip

    whole = {name: piece.expand(3, 1, 64).contiguous() for name, piece in pieces.items()}
    assert all(map(torch.equal, run(**pieces), run(**whole)))
