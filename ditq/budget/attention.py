"""A budget of attention in a recipe: the pass that converts attentions gets it as its setting `macs`, and chooses within it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ditq.budget.request import ATTENTION, Budget
from ditq.errors import DitqError
from ditq.passes.attention_conversion import AttentionConversion
from ditq.passes.local_attention import LocalAttentionPass

if TYPE_CHECKING:
    from ditq.recipe import Recipe


def within(recipe: Recipe, budget: Budget) -> Recipe:
    """The recipe with `macs` set on the pass that converts attentions; where it has none, with windows of all sizes in front.

    Raises:
        DitqError: several such passes, or one that chooses by `fraction`.
    """
    assert budget.kind == ATTENTION
    places = [place for place, step in enumerate(recipe.passes) if isinstance(step, AttentionConversion)]
    if len(places) > 1:
        names = ", ".join(recipe.passes[place].name for place in places)
        raise DitqError(
            f"{recipe.name}: {names} all convert attentions; a budget chooses among what one pass offers, so set macs in each"
        )
    passes = list(recipe.passes)
    if places:
        step = passes[places[0]]
        assert isinstance(step, AttentionConversion)
        passes[places[0]] = replace(step, macs=budget.value)
    else:
        passes.insert(0, LocalAttentionPass(window="search", macs=budget.value))  # type: ignore[arg-type]
    made = replace(recipe, passes=tuple(passes), budget=None if recipe.budget == budget else recipe.budget)
    for step in made.passes:
        step.check()
    return made
