"""Codebooks of one table a tensor: their levels are those of their sources, and their scales the best of the candidates."""

from __future__ import annotations

import itertools

import pytest
import torch

from ditq.numerics.carrier import INT8
from ditq.numerics.codebook import CODEBOOKS, encode
from ditq.numerics.codebooks.apot import apot_magnitudes, apot_table
from ditq.numerics.codebooks.e2m1 import e2m1_table
from ditq.numerics.codebooks.nf import normal_levels, normal_table
from ditq.numerics.codebooks.twin_log_shared import mu_law_table
from ditq.numerics.row_search import ShortRows, SortedRows
from ditq.numerics.scaled_table import CLIPS, best_scales
from tests.numerics.weights import gaussian, heavy_tailed, nearest_error

TABLES = {"nf": normal_table, "apot": apot_table, "e2m1": lambda bits: e2m1_table()}
BITS = [(name, bits) for name in TABLES for bits in range(2, 8) if name != "e2m1" or bits == 4]
# bitsandbytes, four decimals
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
NF4 += [0.7230, 1]


@pytest.mark.parametrize(("name", "bits"), BITS)
def test_tables_are_ascending_whole_and_reach_the_carrier_they_may(name: str, bits: int) -> None:
    table = TABLES[name](bits).int()
    assert len(table) == 1 << bits and bool((table.diff() >= 0).all())
    assert table.unique().numel() == len(table) - (name in ("apot", "e2m1"))  # these two have -0 and +0
    assert 0.75 * INT8.largest(bits) <= int(table.max()) == -int(table.min()) <= INT8.largest(bits)


def test_normal_float_of_four_bits_has_the_levels_of_bitsandbytes() -> None:
    torch.testing.assert_close(normal_levels(4).float(), torch.tensor(NF4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", range(2, 8))
def test_normal_float_levels_leave_equal_shares_of_a_normal_distribution_between_them(bits: int) -> None:
    shares = torch.special.ndtr(
        normal_levels(bits) * torch.special.ndtri(torch.tensor(1 - 31 / 960, dtype=torch.float64))
    ).diff()
    half = 1 << (bits - 1)
    for side in (shares[: half - 1], shares[half - 1 :]):
        torch.testing.assert_close(side, side.mean().expand_as(side), rtol=1e-9, atol=0)
    steps = (normal_table(bits) - normal_levels(bits) * INT8.largest(bits)).abs()
    assert float(steps.max()) <= (0.5 if bits < 7 else 1.0)  # at 7 bits some levels lie closer than the grid's steps


def test_fp4_levels_are_what_its_bits_mean() -> None:
    found = []
    for sign, exponent, mantissa in itertools.product((-1, 1), range(4), range(2)):
        value = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
        found.append(sign * value)
    assert (e2m1_table().float() / e2m1_table().max() * 6).tolist() == pytest.approx(sorted(found))


APOT = {  # sums that the authors' code makes for a sign and 1 to 5 further bits
    2: ([0, 1 / 2],),
    3: ([0, 1 / 2, 1 / 4, 1 / 8],),
    4: ([0, 1 / 2, 1 / 4, 1 / 16], [0, 1 / 8]),
    5: ([0, 1 / 2, 1 / 8, 1 / 32], [0, 1 / 4, 1 / 16, 1 / 64]),
    6: ([0, 1 / 2, 1 / 8, 1 / 64], [0, 1 / 4, 1 / 16, 1 / 128], [0, 1 / 32]),
    7: ([0, 1 / 2, 1 / 16, 1 / 128], [0, 1 / 4, 1 / 32, 1 / 256], [0, 1 / 8, 1 / 64, 1 / 512]),
}


@pytest.mark.parametrize("bits", APOT)
def test_additive_powers_of_two_are_those_of_the_paper(bits: int) -> None:
    expected = sorted(sum(parts) for parts in itertools.product(*APOT[bits]))
    assert (apot_magnitudes(bits) / 2).tolist() == expected
    if bits < 7:  # in exact proportion on the grid
        above = apot_table(bits)[1 << (bits - 1) :].double()
        torch.testing.assert_close(above / above[-1], torch.tensor(expected).double() / expected[-1])


@pytest.mark.parametrize("search", [SortedRows, ShortRows])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("table", [normal_table(3), e2m1_table(), mu_law_table(7, 4.0)], ids=["nf", "e2m1", "mu-law"])
def test_both_searches_find_the_scale_that_trying_all_on_every_value_finds(search, weighted: bool, table) -> None:
    rows = heavy_tailed(5, 40)
    importance = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) ** 3 if weighted else None
    scales = rows.abs().amax(1, keepdim=True) * torch.tensor(CLIPS) / float(table.max())
    scale, errors = search(rows, importance).best_scale(table.float(), scales)
    energy = rows.double().square() if importance is None else rows.double().square() * importance
    left_out = energy.sum(1) if search is SortedRows else 0
    for i, row in enumerate(rows):
        weights = None if importance is None else importance[i]
        tried = torch.stack([nearest_error(row, table * s, weights) for s in scales[i].double()])
        assert float(errors[i] + (left_out[i] if search is SortedRows else 0)) == pytest.approx(
            float(tried.min()), 1e-4
        )
        at = int((scales[i] - scale[i]).abs().argmin())
        assert float(tried[at]) == pytest.approx(float(tried.min()), 1e-4)


@pytest.mark.parametrize("name", ["nf", "apot", "e2m1", "lloyd_max", "twin_log_shared"])
def test_the_scale_of_a_group_does_not_depend_on_the_other_groups(name: str) -> None:
    weight = gaussian(8, 256)
    whole = CODEBOOKS[name](weight, 4, group_size=32, float_group_scales=True)
    alone, _ = best_scales(weight[2:3, 64:96], whole.table[None])
    assert float(whole.scale[2, 2]) == pytest.approx(float(alone), 1e-6)


@pytest.mark.parametrize("name", ["nf", "apot", "e2m1", "lloyd_max"])
def test_groups_lose_less_than_rows_and_multipliers_little_more_than_scales(name: str) -> None:
    weight = heavy_tailed(32, 512)

    def lost(**settings: object) -> float:
        return float((weight - encode(weight, CODEBOOKS[name](weight, 4, **settings)).decode()).square().sum())

    scales, multipliers = lost(group_size=64, float_group_scales=True), lost(group_size=64)
    assert scales < multipliers < 0.9 * lost()
    # a group at a third of its row's scale has a third of the 64 steps: 1/12 of a step squared is 6 % of its error
    assert multipliers < 1.1 * scales
