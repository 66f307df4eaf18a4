"""sparse_attention: image tokens attend to the tiles of the picture that matter to them, and to the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural.held_tiles import HeldTiles
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention, token_attentions
from ditq.numerics.sparse_attention import covered, number_of_tiles, tile_probabilities, tile_scores, tiles_of
from ditq.passes.attention_conversion import AttentionConversion, Place
from ditq.passes.attention_records import AttentionRecord, part_error
from ditq.passes.base import Context, PassReport, register, setting
from ditq.passes.gate import limit_setting

BLOCKS = ("online", "calibrated", "searched")
RESTS = ("means", "nothing")
EVERY = 8
NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # of tiles that `search` tries


@register
@dataclass(frozen=True)
class SparseAttentionPass(AttentionConversion):
    """Let the queries of each tile of the picture see `keep` tiles of keys, chosen for each head, and all text.

    `online` chooses at each call by the means of the tiles' queries and keys, as SpargeAttn does (Zhang 2025, arXiv
    2502.18137); `calibrated` takes those that got the most probability on recorded calls, for pictures of that size only;
    `searched` those that got it in one step of the picture, for the steps after it (AdaSpa, Xia 2025, arXiv 2502.21079). What
    a query does not see stands as the means of each tile, as in PISA (Li 2026, arXiv 2602.01077), or not at all. Text attends
    to all. Nothing is trained, and weights stay as they are.

    Example:
        - sparse_attention: {blocks: online, tile: 8, keep: search, error: 0.02}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "sparse_attention"
    blocks: str = setting(
        "online",
        "when tiles are chosen: at each call, once, from recorded calls, or in some steps of a picture",
        BLOCKS,
    )
    every: int = setting(
        EVERY, "with `searched`, in one of so many steps attention is to all and finds the tiles of the next ones"
    )
    tile: int = setting(8, "tokens along a side of a tile")
    keep: int = setting(
        16,
        "tiles that each tile sees; `search`: the least within `error`, or what `macs` chooses; `mass`: the least with `mass`",
        words=("search", "mass"),
    )
    error: float = setting(
        0.01,
        "largest relative squared error of an attention's output that `search` allows",
        only=("keep", ("search",)),
    )
    mass: float = setting(
        0.95,
        "share of the probability, with the text's, that seen tiles have in the mean with `mass`",
        only=("keep", ("mass",)),
    )
    rest: str = setting("means", "what stands for tiles that are not seen: the means of each, or nothing", RESTS)
    temperature: bool = setting(True, "sharpen scores at larger pictures than those calibrated on, by sqrt(log N)")
    limit: float | str = limit_setting()

    def check(self) -> None:
        super().check()
        if self.tile < 1 or self.error <= 0 or (not isinstance(self.keep, str) and self.keep < 1):
            raise DitqError("pass 'sparse_attention': tile, keep and error must be above 0")
        if not 0 < self.mass < 1:
            raise DitqError("pass 'sparse_attention': mass must be between 0 and 1")
        if self.every != EVERY and self.blocks != "searched":
            raise DitqError("pass 'sparse_attention': every is for blocks: searched; set that or leave it out")
        if self.every < 2:
            raise DitqError("pass 'sparse_attention': every must be at least 2, or no step uses what another found")

    @property
    def keeps_state(self) -> bool:
        return self.blocks == "searched"

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = super().run(graph, context)
        parts = (part for part in token_attentions(graph.model).values() if isinstance(part, SparseAttention))
        picture = next((part.picture for part in parts if part.picture is not None), None)
        if picture is not None:
            graph.fix_picture(picture)
        return report

    def part(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> TokenAttention | None:
        if isinstance(self.keep, str) and not records:
            return None
        made = self.offers(place, records, usual)
        if self.keep != "search":
            return made[0] if made else None
        return next((part for part in made if part_error(part, records) <= self.error), None)

    def offers(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> list[TokenAttention]:
        """All numbers of tiles that `search` knows and that leave some out; without it the one that is set, or has `mass`."""
        if self.blocks == "calibrated" and place.layout.frames:
            raise DitqError(
                f"pass 'sparse_attention': {place.site}: blocks: calibrated is for pictures; set online for videos"
            )
        tiles = number_of_tiles(self.tile, *place.grid.sides)
        known = None
        if records and (self.blocks == "calibrated" or self.keep == "mass"):
            known = self._known(place, records)
        numbers: Sequence[int] = NUMBERS if self.keep == "search" else [self.keep]
        if self.keep == "mass":
            assert known is not None
            numbers = [int((known.covered < self.mass).sum()) + 1]
        return [self._made(place, number, known, usual) for number in numbers if number < tiles]

    def _made(self, place: Place, number: int, known: _Known | None, usual: int) -> TokenAttention:
        calibrated = self.blocks == "calibrated"
        common: dict[str, Any] = {"tile": self.tile, "keep": number, "means": self.rest == "means"}
        common |= {**place.arguments, "usual": usual if self.temperature else 0}
        if self.blocks == "searched":
            return HeldTiles(**common, every=self.every)
        made = SparseAttention(**common, picture=(place.grid.height, place.grid.width) if calibrated else None)
        if calibrated and known is not None:
            assert made.seen is not None
            made.seen.copy_(known.order[0, :, :, :number])
        return made

    def _known(self, place: Place, records: Sequence[AttentionRecord]) -> _Known:
        """Tiles of each tile in the order in which they are taken, and what they have of the probability."""
        for record in records:
            if self.blocks == "calibrated" and record.grid != place.grid:
                raise DitqError(
                    f"pass 'sparse_attention': {place.site}: recorded calls are of pictures of different sizes; calibrate at "
                    "one size, or set blocks: online"
                )
        found = [tile_probabilities(r.query, r.key, r.grid, self.tile, r.scale) for r in records]
        if self.blocks == "calibrated":
            mean = torch.stack([probabilities.mean(0) for probabilities, _ in found]).mean(0, keepdim=True)
            order = mean.argsort(-1, descending=True)
            orders = [order] * len(found)
        elif self.blocks == "searched":
            orders = [probabilities.argsort(-1, descending=True) for probabilities, _ in found]
        else:
            orders = [self._scores(record).argsort(-1, descending=True) for record in records]
        shares = [covered(*one, order) for one, order in zip(found, orders, strict=True)]
        return _Known(orders[0], torch.stack(shares).mean(0))

    def _scores(self, record: AttentionRecord) -> Tensor:
        tokens = torch.from_numpy(tiles_of(self.tile, *record.grid.sides, order=record.grid.order).tokens)
        return tile_scores(*(record.grid.parted(each)[0][:, :, tokens] for each in (record.query, record.key)))

    def described(self, part: TokenAttention) -> str:
        assert isinstance(part, SparseAttention | HeldTiles)
        return f"{part.keep} tiles of {part.tile} x {part.tile}, {self.blocks}"


@dataclass(frozen=True, eq=False)
class _Known:
    """The order of tiles [B, h, T, T], of the first record where each has its own, and the probability that the first 1, 2, ..
    T of them cover [T], in the mean."""

    order: Tensor
    covered: Tensor
