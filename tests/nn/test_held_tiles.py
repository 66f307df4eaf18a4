"""Tiles that one step of a picture found are seen in the steps after it, and in no other picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.nn.structural.held_tiles import MOST, HeldTiles, Turn, Turns
from ditq.numerics.sparse_attention import most_probable, sparse_attention
from ditq.numerics.token_layout import Grid, TokenLayout

GRID, SCALE = Grid(3, 8, 8), 0.3


def part_of(every: int = 3) -> HeldTiles:
    return HeldTiles("site", TokenLayout(), 2, 16, True, 0, tile=2, keep=3, every=every, means=True)


def given(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, 67, 16, generator=generator) for _ in range(3)]


def call(timestep: float, tokens: int = 64, batch: int = 1) -> dict[str, Any]:
    return {"timestep": torch.full((batch,), timestep), "hidden_states": torch.zeros(batch, tokens, 4)}


def turns(calls: list[dict[str, Any]], every: int = 3) -> list[tuple[int, bool]]:
    """(step, whether tiles are searched) of each call."""
    part, found = part_of(every), []
    teller = Turns([part])
    for inputs in calls:
        teller.tell(inputs)
        assert part.turn is not None
        found.append((part.turn.step, part.searches(part.turn)))
    return found


@pytest.mark.parametrize("way", [-1, 1], ids=["falling", "rising"])
def test_every_third_step_of_each_picture_searches(way: int) -> None:
    picture = [call(500 + way * 10 * step) for step in range(5)]
    expected = [(0, True), (1, False), (2, False), (3, True), (4, False)]
    assert turns([*picture, *picture]) == expected * 2


def test_guidance_branches_have_tiles_of_their_own() -> None:
    picture = [call(time, tokens) for time in (9.0, 8.0, 7.0) for tokens in (64, 64, 80)]
    part = part_of()
    teller, places = Turns([part]), []
    for inputs in picture:
        teller.tell(inputs)
        assert part.turn is not None
        places.append(part.turn.place)
    assert len(set(places)) == 3 and places[:3] == places[3:6] == places[6:]
    assert [searches for _, searches in turns(picture)] == [True] * 3 + [False] * 6


def test_a_branch_that_begins_later_and_another_size_search_first() -> None:
    calls = [call(9.0), call(8.0), call(8.0), call(7.0), call(7.0), call(6.0, 80)]
    assert [searches for _, searches in turns(calls, every=100)] == [True, False, True, False, False, True]


def test_a_picture_behind_one_that_broke_off_soon_sees_its_own_tiles() -> None:
    """Its first call looks like a branch of the other's, and the next one may see tiles of that; those after it do not."""
    found = turns([call(9.0), *(call(time) for time in (9.0, 8.0, 7.0, 6.0))], every=100)
    assert found == [(0, True), (0, True), (1, False), (2, True), (3, False)]


def test_pictures_of_one_step_are_never_taken_for_each_other_for_long() -> None:
    found = turns([call(1.0)] * (MOST + 2))
    assert all(searches for _, searches in found)


def test_calls_of_several_timesteps_are_no_step() -> None:
    part = part_of()
    teller = Turns([part])
    teller.tell(call(1.0))
    assert teller.tell({"timestep": torch.tensor([1.0, 0.5]), "hidden_states": torch.zeros(2, 64, 4)}) == ()
    assert part.turn is None


def test_a_model_without_such_parts_is_not_asked_for_its_timestep() -> None:
    assert Turns([]).tell({}) == ()


def test_a_step_that_searches_attends_to_all_and_the_next_sees_what_it_found() -> None:
    part = part_of()
    first, second = given(1), given(2)
    part.turn = Turn(0, "branch", True)
    exact = F.scaled_dot_product_attention(*first, scale=SCALE)
    assert torch.equal(part.attention(*first, GRID, SCALE), exact)
    part.turn = Turn(1, "branch", False)
    seen = most_probable(*first[:2], GRID, SCALE, 2, 3)
    expected = sparse_attention(*second, GRID, SCALE, 2, 3, seen, True)
    assert torch.equal(part.attention(*second, GRID, SCALE), expected)
    held = part.held["branch"]
    part.turn = Turn(3, "branch", False)
    part.attention(*second, GRID, SCALE)
    assert part.held["branch"] is held  # recorded calls read it where it lies
    assert torch.equal(held, most_probable(*second[:2], GRID, SCALE, 2, 3)) and not torch.equal(held, seen)


def test_without_a_turn_tiles_are_found_in_the_call_itself() -> None:
    part, tokens = part_of(), given(1)
    seen = most_probable(*tokens[:2], GRID, SCALE, 2, 3)
    assert torch.equal(part.attention(*tokens, GRID, SCALE), sparse_attention(*tokens, GRID, SCALE, 2, 3, seen, True))
    assert not part.held


def test_multiply_adds_are_those_of_a_step_in_the_mean() -> None:
    """Two of three steps: 3 tiles of 4, 16 means and 3 of text for image tokens, all for text; one: scores twice, values."""
    pairs = 64 * (3 * 4 + 16 + 3) + 3 * 67
    assert part_of().macs(GRID) == 32 * (2 * 2 * pairs + 3 * 67**2) // 3
