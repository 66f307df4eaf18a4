"""The decoding's assembly, run instruction by instruction: every code, table place and multiplier."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ditq.kernels.decoding import assembly
from ditq.kernels.storage import PLANES, carrier_meaning, codes_meaning, store
from ditq.numerics.weight_code import WeightCode
from tests.kernels.interpreter import run_ptx


def run_decoding(
    bits: int, pair: int, planes: np.ndarray, tables: np.ndarray, factors: np.ndarray | None, own: bool
) -> np.ndarray:
    """planes uint8 [P, n, 4], tables int8 [n, 4, L], factors int32 [2, n, 4] -> carriers int8 [2, n, 4]."""
    words = np.ascontiguousarray(tables).view(np.uint32)  # [n, 4, L / 4]
    inputs = [np.ascontiguousarray(plane).view(np.uint32)[:, 0] for plane in planes]
    inputs += [words[:, byte, word] for word in range(words.shape[2]) for byte in range(4)]
    if factors is not None:
        inputs += [run[:, byte].astype(np.int32).view(np.uint32) for run in factors for byte in range(4)]
    text, constraints = assembly(bits, pair, own, factors is not None)
    assert constraints.count("=&r") == 2 and len(constraints.split(",")) == 2 + len(inputs)
    found = run_ptx(text, [np.ascontiguousarray(value) for value in inputs], 2)
    return np.stack([value.view(np.int8).reshape(-1, 4) for value in found])


@pytest.mark.parametrize("own", [False, True])
def test_every_byte_of_4_bit_codes_gives_the_carriers_of_its_two_codes(own: bool) -> None:
    generator = np.random.default_rng(0)
    codes = np.arange(256, dtype=np.uint8)
    quads = np.stack([codes, np.roll(codes, 7), np.roll(codes, 90), np.roll(codes, 201)], axis=1)
    tables = generator.integers(-128, 128, (256, 4, 16)).astype(np.int8)
    tables = tables if own else np.broadcast_to(tables[:1, :1], tables.shape)
    found = run_decoding(4, 0, quads[None], tables, None, own)
    for run, index in enumerate((quads & 15, quads >> 4)):
        assert (found[run] == np.take_along_axis(tables, index[..., None].astype(int), 2)[..., 0]).all()


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("own", [False, True])
def test_every_pair_of_bit_planes_gives_the_carriers_of_its_eight_codes(bits: int, own: bool) -> None:
    generator = np.random.default_rng(bits)
    planes = generator.integers(0, 256, (bits, 4096, 4)).astype(np.uint8)
    tables = generator.integers(-128, 128, (4096, 4, 2**bits)).astype(np.int8)
    tables = tables if own else np.broadcast_to(tables[:1, :1], tables.shape)
    for pair in range(4):
        found = run_decoding(bits, pair, planes, tables, None, own)
        for run, r in enumerate((pair, pair + 4)):
            index = sum(((planes[plane] >> r) & 1).astype(int) << plane for plane in range(bits))
            assert (found[run] == np.take_along_axis(tables, index[..., None], 2)[..., 0]).all()


def test_multipliers_round_exactly_as_the_carrier_does_for_every_number_and_multiplier() -> None:
    """All 256 x 256 pairs, against the exact quotient, which is never halfway since 255 is odd."""
    number, m = (part.reshape(-1, 4) for part in np.meshgrid(np.arange(-128, 128), np.arange(256), indexing="ij"))
    tables = np.repeat(number.astype(np.int8)[:, :, None], 16, axis=2)
    factors = np.stack([65793 * m, 65793 * m[::-1]])
    found = run_decoding(4, 0, np.zeros((1, len(m), 4), np.uint8), tables, factors, own=True)
    for run, multiplier in enumerate((m, m[::-1])):
        assert (found[run] == np.floor((2 * number * multiplier + 255) / 510)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("form", "columns"),
    [*itertools.product(["table", "rows"], [64, 1152, 200]), ("groups", 64), ("groups", 1152)],
)
def test_what_is_stored_for_the_kernels_holds_the_same_carriers(bits: int, columns: int, form: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (10, columns), generator=generator, dtype=torch.uint8)
    shape = (10, 2**bits) if form == "rows" else (2**bits,)
    table = torch.randint(-64, 65, shape, generator=generator).sort(-1).values.to(torch.int8)
    multiplier = None
    if form == "groups":
        multiplier = torch.randint(0, 256, (10, columns // 64), generator=generator, dtype=torch.uint8)
    code = WeightCode(codes, table, torch.rand(10), multiplier, bits)
    stored = store(code)
    assert torch.equal(carrier_meaning(stored), code.carrier())
    if stored.bits < 5:
        assert torch.equal(codes_meaning(stored), codes)
        span = PLANES * 32 if bits < 4 else 128
        assert stored.data.numel() * 8 == 10 * bits * -(-columns // span) * span


def test_groups_that_no_kernel_has_are_refused() -> None:
    code = WeightCode(
        torch.zeros(4, 48, dtype=torch.uint8), torch.zeros(16, dtype=torch.int8), torch.ones(4, 3), None, 4
    )
    with pytest.raises(ValueError, match="groups of 16 columns are no multiple of 32"):
        store(code)
