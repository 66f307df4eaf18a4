"""Orders of tokens hold every token once, keep what lies together in the picture together, and are the same in a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditq.numerics.token_order import KINDS, TokenOrder
from ditq.numerics.window import Window, blocks

SIDES = [(1, 8, 8), (2, 7, 9), (1, 3, 20), (3, 16, 12), (1, 1, 5), (2, 1, 1)]
ORDERS = [TokenOrder("windows", tile) for tile in (1, 2, 3, 8)] + [TokenOrder("hilbert")]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_token_is_there_once_frame_behind_frame(order: TokenOrder, sides: tuple[int, int, int]) -> None:
    listed, places = order.listed(*sides), order.places(*sides)
    assert (np.sort(listed) == np.arange(len(listed))).all() and (listed[places] == np.arange(len(listed))).all()
    assert (listed // (sides[1] * sides[2]) == np.repeat(np.arange(sides[0]), sides[1] * sides[2])).all()


@pytest.mark.parametrize("side", [1, 2, 4, 8, 32])
def test_a_hilbert_curve_goes_from_each_token_to_one_beside_it(side: int) -> None:
    rows, columns = np.divmod(TokenOrder("hilbert").listed(1, side, side), side)
    assert (abs(np.diff(rows)) + abs(np.diff(columns)) == 1).all()


@pytest.mark.parametrize("order", [TokenOrder("windows", 4), TokenOrder("hilbert")], ids=str)
def test_a_square_of_a_power_of_two_is_in_one_piece(order: TokenOrder) -> None:
    rows, columns = np.divmod(order.listed(1, 8, 16), 16)
    tiles = (rows // 4 * 4 + columns // 4).reshape(-1, 16)
    assert (tiles == tiles[:, :1]).all() and len(np.unique(tiles)) == 8


def test_blocks_lie_in_place_where_each_of_their_queries_does_once() -> None:
    tile, order = Window("tiles", 1, 2), TokenOrder("windows", 2)
    assert blocks(tile, 4, 6, order=order).in_place and blocks(tile, 4, 2).in_place
    assert not blocks(tile, 4, 6).in_place and not blocks(tile, 4, 6, order=TokenOrder("windows", 4)).in_place
    assert not blocks(tile, 3, 2).in_place  # whose last row stands twice


def test_windows_go_row_by_row_with_smaller_tiles_at_the_edge() -> None:
    assert TokenOrder("windows", 2).listed(1, 3, 3).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("tile", [1, 2, 3, 8])
def test_the_formula_of_windows_lists_the_same(tile: int, sides: tuple[int, int, int]) -> None:
    order, (frames, height, width) = TokenOrder("windows", tile), sides
    listed, places = order.traced(frames * height * width, torch.tensor([height]), torch.tensor([width]))
    assert listed.tolist() == order.listed(*sides).tolist() and places.tolist() == order.places(*sides).tolist()


def test_a_hilbert_curve_in_a_graph_is_for_one_picture() -> None:
    order = TokenOrder("hilbert", picture=(6, 5))
    listed, places = order.traced(90, torch.tensor([6]), torch.tensor([5]))
    assert listed.tolist() == order.listed(3, 6, 5).tolist() and places.tolist() == order.places(3, 6, 5).tolist()
    with pytest.raises(ValueError, match="made for pictures of 6 x 5 tokens, not of 5 x 6"):
        order.listed(1, 5, 6)


def test_what_is_no_order_is_refused() -> None:
    for kind, tile in (("rows", 8), (KINDS[0], 0)):
        with pytest.raises(ValueError, match="windows or hilbert, with tiles of 1 to 65536"):
            TokenOrder(kind, tile)  # type: ignore[arg-type]
