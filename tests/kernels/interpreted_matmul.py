"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: the product kernel against its meaning in plain torch."""

from __future__ import annotations

import pytest
import torch

from ditq.kernels import tma_matmul
from ditq.kernels.decode import decode_into
from ditq.kernels.matmul import Product, Tile, launch, matmul_meaning
from ditq.kernels.storage import StoredWeight, store, store_carrier, weight_meaning
from ditq.numerics.carrier import E4M3
from ditq.numerics.weight_code import WeightCode
from tests.kernels import interpreter

interpreter.install()
SMALL, TURNED = Tile(32, 64), Tile(16, 32, weight_first=True)


def weight(
    rows: int, columns: int, bits: int, form: str = "table", float8: bool = False, group: int = 64, seed: int = 0
) -> StoredWeight:
    """A stored weight of random codes; form: one table, one a row, or with scales or multipliers of groups."""
    generator = torch.Generator().manual_seed(rows + columns + bits + seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (rows, 2**bits) if "rows" in form else (2**bits,)
    table = torch.randint(-127, 128, shape, generator=generator).sort(-1).values.to(torch.int8)
    table = table.float().to(E4M3) if float8 else table
    scale, multiplier = torch.rand(rows, generator=generator) + 0.5, None
    if "scales" in form:
        scale = torch.rand(rows, columns // group, generator=generator) + 0.5
    if "multipliers" in form:
        multiplier = torch.randint(0, 256, (rows, columns // group), generator=generator, dtype=torch.uint8)
    return store(WeightCode(codes, table, scale, multiplier, bits))


def check(
    stored: StoredWeight, tokens: int, kind: str, tile: Tile, groups: int = 1, bias: bool = True, added: bool = True
) -> None:
    """The kernel fills every output, poisoned with NaN before, with the meaning."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-127, 128, (tokens, stored.columns), generator=generator).to(torch.int8)
    x_scale: torch.Tensor | None = torch.rand(tokens, *([groups] if groups > 1 else []), generator=generator) + 0.1
    if kind == "float8":
        x = x.float().to(E4M3)
    elif kind == "float":
        x, x_scale = torch.randn(tokens, stored.columns, generator=generator).bfloat16(), None
    b = torch.randn(stored.rows, generator=generator) if bias else None
    a = torch.randn(tokens, stored.rows, generator=generator) if added else None
    y = torch.full((tokens, stored.rows), torch.nan)
    launch(Product(x, x_scale, stored, b, a), y, tile)
    expected = matmul_meaning(x, x_scale, stored, b, a)
    # Integer sums are exact, then a few float32 roundings; sums of floats lose at most K of them, in the mean sqrt(K);
    # a weight in float goes to bfloat16 by group.
    size = matmul_meaning(
        x.float().abs().to(x.dtype) if kind != "int8" else x.abs(), x_scale, _absolute(stored), None, None
    )
    unit = 2.0**-24 * (8 if kind == "int8" else stored.columns) + (
        2.0**-8 if kind == "float" and stored.scale.dim() == 2 else 0
    )
    error = (y.double() - expected).abs()
    assert bool((error <= unit * (size + expected.abs() + 4)).all()), (
        float((error / (size + expected.abs() + 4)).max()) / unit
    )


def _absolute(stored: StoredWeight) -> StoredWeight:
    from ditq.kernels.storage import carrier_meaning

    carrier = carrier_meaning(stored).float().abs().clamp_max(127 if not stored.float8 else 448)
    made = store_carrier(carrier.to(E4M3 if stored.float8 else torch.int8), stored.scale)
    return made


@pytest.mark.parametrize("form", ["table", "rows", "multipliers", "rows multipliers"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coded_weights_of_every_form(bits: int, form: str) -> None:
    check(weight(72, 320, bits, form), 21, "int8", SMALL)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_weight_may_stand_first(bits: int) -> None:
    check(weight(40, 192, bits), 19, "int8", TURNED)


@pytest.mark.parametrize(("bits", "rows", "columns"), [(3, 80, 4608), (4, 1152, 384), (4, 80, 4608), (8, 1152, 384)])
def test_the_widths_of_dit_xl(bits: int, rows: int, columns: int) -> None:
    """N = 1152 and K = 4608, as its second feed-forward linear has; M no multiple of the tile."""
    tile = Tile(16, 128, step=128)
    check(weight(rows, columns, bits, "multipliers" if bits < 8 else "table"), 5, "int8", tile, added=False)


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("columns", [24, 100])
def test_widths_that_no_run_divides(tokens: int, columns: int) -> None:
    for bits in (3, 4, 8):
        check(weight(20, columns, bits), tokens, "int8", SMALL, bias=False, added=False)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_of_channels_with_scales_of_their_own(bits: int) -> None:
    check(weight(40, 256, bits, "multipliers" if bits < 8 else "table"), 9, "int8", SMALL, groups=4)
    check(weight(40, 256, bits), 9, "int8", TURNED, groups=4)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_float8_carriers_and_inputs(bits: int) -> None:
    check(weight(40, 192, bits, "rows" if bits < 8 else "table", float8=True), 9, "float8", SMALL)


@pytest.mark.parametrize("form", ["table", "rows", "scales"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inputs_in_floating_point(bits: int, form: str) -> None:
    check(weight(40, 192, bits, form), 2, "float", SMALL)


def test_float8_carriers_and_inputs_in_floating_point() -> None:
    check(weight(40, 192, 4, "scales", float8=True), 2, "float", SMALL)


def test_groups_of_32_columns() -> None:
    check(weight(24, 192, 4, "multipliers", group=32), 7, "int8", SMALL)
    check(weight(24, 192, 4, "scales", group=96), 7, "float", SMALL)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("group", [32, 96])
def test_groups_of_carriers_that_no_run_of_64_divides(bits: int, group: int) -> None:
    """Multiplied as they are decoded, and written out in full, where each weight goes to bfloat16 once."""
    stored = weight(24, 192, bits, "scales", group=group)
    check(stored, 7, "float", SMALL)
    check(stored, 7, "float", TURNED)
    full = torch.full((24, 192), torch.nan, dtype=torch.bfloat16)
    decode_into(stored, full)
    assert torch.equal(full, weight_meaning(stored).bfloat16())


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
def test_activations_behind_the_product(activation: str) -> None:
    """At values around zero, where they bend, and far from it."""
    stored = weight(40, 192, 4)
    x = torch.randint(-127, 128, (9, 192), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.logspace(-6, -2, 9)
    y = torch.full((9, 40), torch.nan)
    for tile in (SMALL, TURNED):
        launch(Product(x, scale, stored, activation=activation), y.fill_(torch.nan), tile)
        expected = matmul_meaning(x, scale, stored, None, None, activation)
        inner = matmul_meaning(x, scale, stored, None).abs()
        slack = 2.0**-11 * inner if activation == "gelu_tanh" else 1e-5 * expected.abs()  # tanh.approx has 11 bits
        assert bool(((y.double() - expected).abs() <= slack + 1e-6).all())


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 48, 208), (70, 48, 208), (130, 1152, 64), (33, 80, 4608)])
def test_tiles_brought_by_the_tensor_memory_accelerator(kind: str, tokens: int, rows: int, columns: int) -> None:
    """More rows of tiles than run side by side, and sizes that no tile divides."""
    stored = weight(rows, columns, 8, float8=kind == "float8")
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-127, 128, (tokens, columns), generator=generator).to(torch.int8)
    x = x.float().to(E4M3) if kind == "float8" else x
    scale, bias = torch.rand(tokens, generator=generator) / columns, torch.randn(rows, generator=generator)
    added = torch.randn(tokens, rows, generator=generator)
    for product in (Product(x, scale, stored), Product(x, scale, stored, bias, added, activation="gelu_tanh")):
        y = torch.full((tokens, rows), torch.nan)
        tma_matmul.launch(product, y, Tile(32, 64, step=64, brought=True))
        expected = matmul_meaning(x, scale, stored, product.bias, product.added, product.activation)
        assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
