"""HeldTiles: tiles that got the most probability in one step of a picture, seen in the steps after it.

AdaSpa (Xia 2025, arXiv 2502.21079): which tiles matter changes slowly from step to step. So some steps compute all scores,
attend to all and find the tiles, and those between them see these. That is a state between calls, which a model alone does not
have: whoever runs it for pictures tells its parts the `Turn` of each call (`Turns`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ditq.nn.structural import register
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.sparse_attention import most_probable, number_of_tiles, sparse_attention
from ditq.numerics.token_layout import Grid, TokenLayout

TIMESTEP = "timestep"
MOST = 8  # calls of one step, of guidance branches; more are of pictures that have one step only


@dataclass(frozen=True)
class Turn:
    """A call's place among those of a picture: the step, counted from 0; what tells the step's calls and their shapes apart;
    and whether it is the picture's first one there."""

    step: int
    place: Hashable
    first: bool


@register
class HeldTiles(TokenAttention):
    """softmax over all in one of `every` steps of a picture; in the others over the `keep` tiles of tile x tile tokens that
    had the most probability there, the text and, with `means`, the means of all other tiles.

    Without a turn, in calls that are no steps of a picture, tiles are found in the call itself.
    """

    kind: ClassVar[str] = "held_tiles"
    over_tiles = staticmethod(sparse_attention)  # a GPU's own takes its place in a part

    def __init__(
        self,
        site: str,
        layout: TokenLayout,
        heads: int,
        width: int,
        text: bool,
        usual: int,
        tile: int,
        keep: int,
        every: int,
        means: bool = False,
    ) -> None:
        super().__init__(site, layout, heads, width, text, usual)
        self.tile, self.keep, self.every, self.means = tile, keep, every, means
        self.turn: Turn | None = None
        self.held: dict[Hashable, Tensor] = {}  # by the turn's place; written in place, for recorded calls read there

    def searches(self, turn: Turn) -> bool:
        """Whether that call attends to all and finds tiles."""
        return turn.first or turn.step % self.every == 0

    def attention(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        turn = self.turn
        if turn is not None and not self.searches(turn):
            return self.over_tiles(
                query, key, value, grid, scale, self.tile, self.keep, self.held[turn.place], self.means
            )
        found = most_probable(query, key, grid, scale, self.tile, self.keep)
        if turn is None:
            return self.over_tiles(query, key, value, grid, scale, self.tile, self.keep, found, self.means)
        if turn.place in self.held:
            self.held[turn.place].copy_(found)
        else:
            self.held[turn.place] = found
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    def macs(self, grid: Grid) -> int:
        """In the mean over steps: scores are computed twice where tiles are searched."""
        tiles, channels, tokens = (
            number_of_tiles(self.tile, *grid.sides),
            self.heads * self.width,
            grid.text + grid.image,
        )
        keys = min(self.keep, tiles) * self.tile**2 + grid.text + tiles * self.means
        pairs = grid.image * keys + grid.text * tokens
        return channels * (2 * (self.every - 1) * pairs + 3 * tokens**2) // self.every

    def settings(self) -> dict[str, Any]:
        return {"tile": self.tile, "keep": self.keep, "every": self.every, "means": self.means}

    def extra_repr(self) -> str:
        rest = ", means of the rest" if self.means else ""
        return f"{self.keep} tiles of {self.tile} x {self.tile}, found every {self.every} steps{rest}"


class Turns:
    """Tells the parts of a model the turn of each of its calls, which it reads off their timesteps.

    Those of a picture go one way; the first call that goes back is of another picture. Calls of one timestep are guidance
    branches of a step, in the same order in all. After a step of fewer than the one before they search again: what looked
    like a branch there may have been the first call of another picture.
    """

    def __init__(self, parts: Iterable[TokenAttention]) -> None:
        self.parts = [part for part in parts if isinstance(part, HeldTiles)]
        self._last: float | None = None
        self._way = 0.0  # of timesteps: -1 falling, 1 rising, 0 not seen yet
        self._step, self._branch = 0, 0
        self._branches = 0  # of the step before; 0 in the first one
        self._places: set[Hashable] = set()  # of this picture

    def tell(self, inputs: Mapping[str, Any]) -> Hashable:
        """Tell the turn of a call with these inputs; what tells apart calls that are not recorded as one.

        A model without such parts is told nothing, and its timestep stays where it is: to read it waits for the device.
        """
        if not self.parts:
            return ()
        turn = self._next(inputs)
        for part in self.parts:
            part.turn = turn
        return () if turn is None else (turn.place, *(part.searches(turn) for part in self.parts))

    def _next(self, inputs: Mapping[str, Any]) -> Turn | None:
        timesteps = set(inputs[TIMESTEP].flatten().tolist())
        if len(timesteps) != 1:
            return None
        self._move(timesteps.pop())
        shapes = tuple((name, tuple(each.shape)) for name, each in inputs.items() if isinstance(each, Tensor))
        place = (self._branch, shapes)
        first = place not in self._places
        self._places.add(place)
        return Turn(self._step, place, first)

    def _move(self, timestep: float) -> None:
        if timestep == self._last and self._branch + 1 < MOST:
            self._branch += 1
            return
        way = 0.0 if self._last is None else float((timestep > self._last) - (timestep < self._last))
        branches = self._branch + 1
        self._last, self._branch = timestep, 0
        if way and self._way in (0, way):
            if branches < self._branches:
                self._places = set()
            self._way, self._step, self._branches = way, self._step + 1, branches
        else:
            self._step, self._places, self._branches = 0, set(), 0
