"""linear_attention: features in the place of the softmax over the picture, so that cost is proportional to its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ditq.errors import DitqError
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.linear_attention import FEATURES
from ditq.numerics.window import SHAPES, Window
from ditq.passes.attention_conversion import FittedConversion, Place
from ditq.passes.attention_records import AttentionRecord
from ditq.passes.base import register, setting
from ditq.passes.gate import limit_setting

FORMS = ("joined", "added")
FRAMES_OF_A_BLOCK = 4  # of a video: queries of so many frames share the keys of their window, which is in all frames


@register
@dataclass(frozen=True)
class LinearAttentionPass(FittedConversion):
    """Let image tokens see the picture through features of queries and keys, whose sums are made once for all queries.

    Text keys keep their softmax, a window of the picture too if there is one. `joined`: all weights have one normaliser
    (LoLCATs, Zhang 2024, arXiv 2410.10254); `added`: the linear part is added behind a projection of zeros, so that the
    attention starts as one to the window (SLA, Zhang 2025, arXiv 2509.24006). Without training only a few attentions bear
    it: take a `fraction`, and `distill` behind it.

    Example:
        - linear_attention: {features: softmax, fraction: 0.25}
        - distill: {steps: 200}
        - quantize: {format: w4a8}
    """

    name: ClassVar[str] = "linear_attention"
    features: str = setting("softmax", "relu, elu (elu + 1), or softmax of a learned map and of its negative", FEATURES)
    form: str = setting("joined", "how the linear part meets what keeps its softmax", FORMS)
    window: int = setting(0, "image keys under softmax: tiles along a side, or the circle's radius; 0: none")
    shape: str = setting(
        "tiles",
        "what a window is: square blocks of tiles, or a circle around each token",
        SHAPES,
        only=("window", None),
    )
    tile: int = setting(
        8, "tokens along a side of a tile; for a circle only the block in which it is computed", only=("window", None)
    )
    locality: bool = setting(False, "add a 3 x 3 convolution of the values, one kernel a channel, zero at first")
    temperature: bool = setting(True, "sharpen scores at larger pictures than those calibrated on, by sqrt(log N)")
    limit: float | str = limit_setting()

    def check(self) -> None:
        super().check()
        if self.tile < 1 or self.window < 0:
            raise DitqError("pass 'linear_attention': tile must be above 0, window must not be negative")
        if self.form == "added" and not self.window:
            raise DitqError("pass 'linear_attention': form added adds to a window; set window")

    def part(self, place: Place, records: Sequence[AttentionRecord], usual: int) -> TokenAttention | None:
        if self.locality and place.layout.frames:
            raise DitqError(
                f"pass 'linear_attention': {place.site}: locality is for pictures, not for videos; leave it out"
            )
        window = None
        if self.window:
            tile_frames = FRAMES_OF_A_BLOCK if place.layout.frames else 1
            window = Window("circle" if self.shape == "circle" else "tiles", self.window, self.tile, 0, tile_frames)
            if window.covers(*place.grid.sides):
                return None
        known = usual if self.temperature else 0
        made = LinearAttention(
            **place.arguments,
            usual=known,
            features=self.features,
            window=window,
            added=self.form == "added",
            locality=self.locality,
        )
        if made.gain is not None and records:
            gains = [made.start_gain(r.query, r.key, r.value, r.grid, r.scale) for r in records]
            made.gain.copy_(torch.stack(gains).mean(0))
        return made

    def described(self, part: TokenAttention) -> str:
        assert isinstance(part, LinearAttention)
        if part.window is None:
            return f"linear, {self.features}"
        return f"linear, {self.features}, {self.form} to {self.shape} {self.window}"
