"""OrderedTokens: image tokens in another order between the model's first block and its last (numerics/token_order.py).

They are put into it once, with their rotary embeddings, and back once. Where the picture comes as tokens with positions, these
arguments and the answer are moved; else what the first block gets, and what the last linear gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ditq.nn.structural import StructuralPart, register
from ditq.numerics.local_attention import on
from ditq.numerics.token_layout import Grid, TokenLayout

NAME = "token_order"
TOKENS = "hidden_states"  # diffusers' name for image tokens, of models and of blocks


@register
class OrderedTokens(StructuralPart):
    """Moves the tokens of the model that it is in.

    Args:
        layout: how to read the grid of a call, with the order.
        entry, exit: names of the first block, and of the linear behind the last one that makes the answer of image tokens.
    """

    kind: ClassVar[str] = NAME
    fitted_by: ClassVar[None] = None

    def __init__(self, layout: TokenLayout, entry: str, exit: str) -> None:
        super().__init__()
        self.layout, self.entry, self.exit = layout, entry, exit
        self.exporting = False
        self.told: Grid | None = None  # by whoever knows the grid of the next calls, and may not read it off them
        # Of the call that runs: which token comes to a place, and back; what is still to be moved.
        self._moves: tuple[Tensor, Tensor] | None = None
        self._left: set[str] = set()

    def spec(self) -> dict[str, Any]:
        return {"layout": asdict(self.layout), "entry": self.entry, "exit": self.exit}

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        part = cls(**{**spec, "layout": TokenLayout.from_spec(spec["layout"])})
        if part.layout.order is None:
            raise ValueError("tokens are put in order by an order, and there is none")
        for name in (part.entry, part.exit, part.layout.rotary or part.entry):
            model.get_submodule(name)
        put_in(model, part)

    def tell(self, given: Mapping[str, Any]) -> Grid:
        """Tell it the grid of calls with these arguments of the model, until it is told another."""
        self.told = self.layout.grid(given)
        return self.told

    # --- hooks

    def begin(self, model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Before the model."""
        bound = signature(model.forward).bind(*arguments, **keywords)
        given = bound.arguments
        self._moves, self._left = self._moves_of(given), {"enter", "turn", "leave"}
        if self.layout.positions is None:
            self._watch(model)
            return None
        for name in (self.layout.latents, self.layout.positions):
            given[name] = torch.index_select(given[name], -2, self._moves[0])
        return bound.args, bound.kwargs

    def _moves_of(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if self.exporting:
            moved = self.layout.traced_grid(given).moved
            assert moved is not None
            return moved
        grid, order = self.told or self.layout.grid(given), self.layout.order
        assert order is not None
        latents = given[self.layout.latents]
        return on(latents, order.listed(*grid.sides)), on(latents, order.places(*grid.sides))

    def _watch(self, model: nn.Module) -> None:
        """Put hooks on modules that have none yet: passes behind this one put others into their places, or around them, so
        that there may be two, of which one has something to do.
        """
        rotary = self.layout.rotary
        first, last = model.get_submodule(self.entry), model.get_submodule(self.exit)
        if self.enter not in first._forward_pre_hooks.values():
            first.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        if self.leave not in last._forward_hooks.values():
            last.register_forward_hook(self.leave)
        if rotary is not None and self.turn not in (made := model.get_submodule(rotary))._forward_hooks.values():
            made.register_forward_hook(self.turn)

    def enter(self, block: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Before the first block."""
        if not self._is_due("enter"):
            return None
        if TOKENS in keywords:
            return tuple(arguments), {**keywords, TOKENS: self._moved(keywords[TOKENS], 0)}
        return (self._moved(arguments[0], 0), *arguments[1:]), keywords

    def leave(self, linear: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """Behind the last linear."""
        return self._moved(output, 1) if self._is_due("leave") else output

    def turn(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """Behind what makes rotary embeddings: tensors with tokens in the first dimension, or in the second behind one of 1."""
        if not self._is_due("turn"):
            return output
        assert self._moves is not None
        listed = self._moves[0]
        return tree_map_only(Tensor, lambda made: torch.index_select(made, int(made.shape[0] == 1), listed), output)

    def end(self, model: nn.Module, arguments: Any, output: Any) -> Any:
        """Behind the model."""
        if self.layout.positions is not None and output is not None:  # as it is behind what failed
            output = tree_map_only(Tensor, lambda answer: self._moved(answer, 1), output)
        self._moves, self._left = None, set()
        return output

    def _is_due(self, what: str) -> bool:
        """Whether that is to be done now: once in a call of the model, never where a module is called without it."""
        due = what in self._left
        self._left.discard(what)
        return due

    def _moved(self, tokens: Tensor, way: int) -> Tensor:
        """[B, N, d] there (0) or back (1)."""
        assert self._moves is not None
        return torch.index_select(tokens, -2, self._moves[way])


def put_in(model: nn.Module, part: OrderedTokens) -> None:
    """Let `part` order the tokens of `model`."""
    model.add_module(NAME, part)
    model.register_forward_pre_hook(part.begin, with_kwargs=True)
    model.register_forward_hook(part.end, always_call=True)


def other_order(made_for: tuple[int, int], given: tuple[int, int]) -> str:
    """What is wrong with a picture, and what to do."""
    pictures = " x ".join(map(str, made_for)), " x ".join(map(str, given))
    return (
        f"its order of tokens was made for pictures of {pictures[0]} tokens, not of {pictures[1]}; ask for that size, or "
        "compile with token_order's order: windows"
    )


def ordered_tokens(model: nn.Module) -> OrderedTokens | None:
    """That of a model."""
    return getattr(model, NAME, None)


def order_as(model: nn.Module, other: nn.Module) -> None:
    """Let tokens of `model` lie as those of `other` do, so that what their modules give can be compared."""
    part = ordered_tokens(other)
    if part is not None and ordered_tokens(model) is None:
        put_in(model, OrderedTokens(part.layout, part.entry, part.exit))
