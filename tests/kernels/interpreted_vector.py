"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: the product of few tokens against its meaning in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.kernels.matmul import Product, Tile, matmul_meaning
from ditq.kernels.storage import StoredWeight, store_carrier
from ditq.kernels.vector import fits, launch
from ditq.numerics.carrier import E4M3
from tests.kernels import interpreter
from tests.kernels.interpreted_matmul import weight

interpreter.install()


def check(stored: StoredWeight, tokens: int, tile: Tile, whole: bool = True) -> None:
    """Every output, poisoned with NaN before, is the meaning. whole: with bias, something added and an activation."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, stored.columns, generator=generator).bfloat16()
    bias: Tensor | None = torch.randn(stored.rows, generator=generator) if whole else None
    added: Tensor | None = torch.randn(tokens, stored.rows, generator=generator) if whole else None
    product = Product(x, None, stored, bias, added, activation="silu" if whole else "")
    assert fits(product)
    y = torch.full((tokens, stored.rows), torch.nan)
    launch(product, y, tile)
    expected = matmul_meaning(x, None, stored, bias, added, product.activation)
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("form", ["table", "rows", "scales", "rows scales"])
@pytest.mark.parametrize("float8", [False, True], ids=["int8", "FP8"])
def test_weights_of_4_bits(form: str, float8: bool) -> None:
    """Rows and bytes that no tile divides."""
    check(weight(22, 1152, 4, form, float8), 3, Tile(1, 4, step=128))


@pytest.mark.parametrize("group", [32, 64, 192])
def test_groups_of_columns(group: int) -> None:
    check(weight(10, 384, 4, "scales", group=group), 1, Tile(1, 8, step=128), whole=False)


@pytest.mark.parametrize("columns", [24, 100, 320])
def test_widths_that_no_run_divides(columns: int) -> None:
    check(weight(5, columns, 4), 2, Tile(1, 4, step=512))


@pytest.mark.parametrize("form", ["rows alone", "groups"])
@pytest.mark.parametrize("kind", [torch.int8, E4M3], ids=str)
def test_weights_of_8_bits(form: str, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    carrier = torch.randint(-127, 128, (9, 192), generator=generator).to(kind)
    scale = torch.rand(9, *([6] if form == "groups" else []), generator=generator) + 0.5
    check(store_carrier(carrier, scale), 2, Tile(1, 4, step=128))


def test_what_it_has_no_form_of() -> None:
    few, many = torch.zeros(8, 192, dtype=torch.bfloat16), torch.zeros(9, 192, dtype=torch.bfloat16)
    plain = weight(8, 192, 4, "scales")
    assert fits(Product(few, None, plain)) and not fits(Product(many, None, plain))
    assert not fits(Product(few, None, weight(8, 192, 3, "scales")))
    assert not fits(Product(few, None, weight(8, 192, 4, "multipliers")))
    assert not fits(Product(few.to(torch.int8), torch.ones(8), plain))
