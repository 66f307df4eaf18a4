"""Chosen tiles by FlexAttention compute what sparse_attention means: by torch's operators, and compiled by blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels import tiled_attention
from ditq.kernels.answered_attention import KINDS
from ditq.kernels.tiled_attention import arguments, block_of, image_over_tiles
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.numerics.sparse_attention import number_of_tiles, sparse_attention
from ditq.numerics.token_layout import Grid
from ditq.numerics.token_order import TokenOrder
from tests.export.quantized import relative
from tests.export.test_token_attentions import HEADS, WIDTH, part_of

GRIDS = [
    Grid(9, 32, 24),
    Grid(0, 21, 19),
    Grid(9, 21, 19, False),
    Grid(70, 16, 24, order=TokenOrder("windows", 8)),
    Grid(3, 11, 9, frames=3),
]


def given(grid: Grid) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, HEADS, grid.text + grid.image, WIDTH, generator=generator) for _ in range(3)]


def settings(grid: Grid, calibrated: bool, means: bool) -> tuple[int, int, Tensor | None, bool]:
    tiles, generator = number_of_tiles(8, *grid.sides), torch.Generator().manual_seed(1)
    seen = torch.rand(HEADS, tiles, tiles, generator=generator).argsort(-1)[..., :4].int() if calibrated else None
    return 8, 4, seen, means


@pytest.mark.parametrize("means", [False, True], ids=["alone", "means"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["online", "calibrated"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_its_meaning(grid: Grid, calibrated: bool, means: bool) -> None:
    tensors, chosen = given(grid), settings(grid, calibrated, means)
    expected = grid.parted(sparse_attention(*tensors, grid, 0.3, *chosen))[0]
    assert relative(image_over_tiles(*arguments(*tensors, grid, 0.3, *chosen)), expected) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [Grid(9, 21, 19), Grid(5, 16, 24)], ids=["tiles beyond the edge", "whole tiles"])
def test_compiled_only_the_blocks_that_are_seen_are_read(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler for CPUs wants a column for each block of keys, that for GPUs does not."""
    plain = tiled_attention._blocks

    def wide(seen: Tensor, each: int, tiles: int, behind: int, whole: bool) -> Any:
        found = plain(seen, each, tiles, behind, whole)
        padded = [None if table is None else F.pad(table, (0, tiles * each + behind - table.shape[-1]))
                  for table in found[1::2]]  # fmt: skip
        return found[0], padded[0], found[2], padded[1]

    monkeypatch.setattr(tiled_attention, "_blocks", wide)
    tensors, chosen = given(grid), settings(grid, True, True)
    compute = torch.compile(image_over_tiles, fullgraph=True, dynamic=False)
    with torch.no_grad():
        found = compute(*arguments(*tensors, grid, 0.3, *chosen))  # type: ignore[arg-type]
    assert relative(found, grid.parted(sparse_attention(*tensors, grid, 0.3, *chosen))[0]) < 1e-6


@pytest.mark.parametrize(("tile", "keep", "behind"), [(8, 3, 1), (16, 3, 1), (8, 2, 5), (8, 3, 0)])
def test_tables_of_masked_and_of_whole_blocks_lie_alike(tile: int, keep: int, behind: int) -> None:
    """torch's kernel for GPUs takes the strides of the one for the other, in some of its versions."""
    each = tile**2 // (block_of(tile) or 1)
    seen = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :keep]
    count, masked, count_whole, whole = tiled_attention._blocks(seen, each, 6, behind, True)
    assert whole is not None and count_whole is not None
    assert masked.shape == whole.shape and masked.is_contiguous() and whole.is_contiguous()
    assert set(count.unique().tolist()) == {behind} and set(count_whole.unique().tolist()) == {keep * each}
    assert (whole[1, 2, 4 * each, : keep * each] // each).unique().tolist() == sorted(seen[1, 2, 4].tolist())
    assert masked[1, 2, 4 * each, :behind].tolist() == list(range(6 * each, 6 * each + behind))


@pytest.mark.parametrize("tile", [4, 8, 16])
def test_a_part_of_a_large_picture_runs_so(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many tokens on, and where tiles are made of blocks."""
    calls: list[Any] = []

    def counted(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return image_over_tiles(*inputs)

    monkeypatch.setattr(tiled_attention, "image_over_tiles", counted)
    grid = Grid(9, 32, 24)
    for least in (32 * 24, 32 * 24 + 1):
        monkeypatch.setattr(tiled_attention, "LEAST", least)
        part = part_of(SparseAttention, True, tile=tile, keep=3, means=True)
        meant = part_of(SparseAttention, True, tile=tile, keep=3, means=True).attention(*given(grid), grid, 0.3)
        assert relative(KINDS[SparseAttention](part)(*given(grid), grid, 0.3), meant) < 1e-6
    assert len(calls) == (0 if block_of(tile) is None else 1)
