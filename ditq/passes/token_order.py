"""token_order: image tokens that lie near each other in the picture lie near each other in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural.ordered_tokens import OrderedTokens, ordered_tokens, put_in
from ditq.nn.structural.token_attention import token_attentions
from ditq.numerics.token_layout import TokenLayout
from ditq.numerics.token_order import KINDS, LARGEST_TILE, Kind, TokenOrder
from ditq.passes.base import Context, Pass, PassReport, register, setting


@register
@dataclass(frozen=True)
class TokenOrderPass(Pass):
    """Put image tokens into another order before the first block, with their position embeddings, and back behind the last.

    Attention does not ask where its tokens lie, so the model computes what it did. Passes that cut the picture into tiles find
    those of `windows` of the same tile in one piece, and copy neither queries nor answers; on a GPU, where models have tokens
    row by row, each attention with windows copies queries, keys, values and answers else. `hilbert` is for pictures of the
    example's size alone.

    Example:
        - token_order: {order: windows, tile: 8}
        - local_attention: {tile: 8, window: 3}
    """

    name: ClassVar[str] = "token_order"
    exact: ClassVar[bool] = True
    structural: ClassVar[bool] = True
    order: Kind = setting("windows", "tile by tile, or along a Hilbert curve; models have them row by row", KINDS)
    tile: int = setting(8, "tokens along a side of a tile of `windows`", only=("order", ("windows",)))

    @property
    def requires_statistics(self) -> bool:
        return False

    def check(self) -> None:
        if not 1 <= self.tile <= LARGEST_TILE:
            raise DitqError(f"pass 'token_order': tile is {self.tile}, must be 1 to {LARGEST_TILE}")

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        self._part(graph)
        return {}

    def sketch(self, graph: DiTGraph) -> None:
        self._put(graph.model, self._part(graph))
        graph.refresh()

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        part = self._part(graph)
        if part.layout.order is not None and (picture := part.layout.order.picture) is not None:
            other = self._drawn(graph, context) - {picture}
            if other:
                sizes = " x ".join(map(str, other.pop())), " x ".join(map(str, picture))
                raise DitqError(
                    f"pass 'token_order': pictures of {sizes[0]} tokens were recorded, and a Hilbert curve is for those of "
                    f"{sizes[1]}; calibrate at that size, or set order: windows"
                )
            graph.fix_picture(picture)
        self._put(graph.model, part)
        if context.original is not None:  # blocks of both are compared, so their tokens lie alike
            put_in(context.original, OrderedTokens(part.layout, part.entry, part.exit))
        graph.refresh()
        return PassReport(self.name, self.settings(), summary={"order": str(part.layout.order)})

    @staticmethod
    def _put(model: nn.Module, part: OrderedTokens) -> None:
        for attention in token_attentions(model).values():
            attention.layout = part.layout
        put_in(model, part)

    @staticmethod
    def _drawn(graph: DiTGraph, context: Context) -> set[tuple[int, int]]:
        """Rows and columns of tokens of the pictures that were recorded."""
        layout = graph.layout
        if layout is None or not context.has_trajectories:
            return set()
        grids = [layout.grid(call.arguments) for call in context.trajectories().calls()]
        return {(grid.height, grid.width) for grid in grids}

    def _part(self, graph: DiTGraph) -> OrderedTokens:
        """What the model gets.

        Raises:
            DitqError: a model that is in an order already, of which it is not known where its picture lies, or that asks where
                its tokens lie.
        """
        model = type(graph.model).__name__
        if ordered_tokens(graph.model) is not None:
            raise DitqError(
                f"pass 'token_order': tokens of {model} are in an order already; take one of the passes out"
            )
        layout = graph.layout
        if layout is None:
            raise DitqError(
                f"pass 'token_order': where the picture of {model} lies among the tokens is not known; give its family a layout"
            )
        for name in graph.blocks:
            block = graph.model.get_submodule(name)
            mixing = [part for part in block.modules() if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
            if mixing:
                raise DitqError(
                    f"pass 'token_order': {name} of {model} has a convolution of the picture, which asks where tokens lie; "
                    "leave the pass out"
                )
        grid = layout.grid(graph.example_inputs)
        last = [site for site in graph.sites.values() if site.role == "final" and site.tokens == grid.image]
        if not last:
            raise DitqError(
                f"pass 'token_order': {model} has no last linear over the tokens of its picture; leave the pass out"
            )
        attending = [found.module for found in graph.attentions.values()]
        first = next(name for name in graph.blocks if any(module.startswith(f"{name}.") for module in attending))
        return OrderedTokens(self._ordered(layout, (grid.height, grid.width)), first, last[-1].name)

    def _ordered(self, layout: TokenLayout, picture: tuple[int, int]) -> TokenLayout:
        of_hilbert = self.order == "hilbert"
        return replace(layout, order=TokenOrder(self.order, self.tile, picture if of_hilbert else None))
