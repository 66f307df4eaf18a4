"""LinearAttention: image tokens see the picture through features instead of a softmax (numerics/linear_attention.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.structural import register
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.linear_attention import LinearForm, image_mass, linear_attention, softmax_mass
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.numerics.window import Window

TINY = 1e-30
NOISE = 1e-7  # of a sum in float32


@register
class LinearAttention(TokenAttention):
    """The parameters of a `LinearForm`: maps near the identity, gain 0, projection and convolution of zeros at first.

    `added`: the linear part is added to attention to a window, through the projection, instead of sharing its normaliser; so
    it starts as `LocalAttention` of that window.
    """

    kind: ClassVar[str] = "linear_attention"

    def __init__(
        self,
        site: str,
        layout: TokenLayout,
        heads: int,
        width: int,
        text: bool,
        usual: int,
        features: str,
        window: Window | Mapping[str, Any] | None = None,
        added: bool = False,
        locality: bool = False,
    ) -> None:
        super().__init__(site, layout, heads, width, text, usual)
        self.features, self.added = features, added
        self.window = Window(**window) if isinstance(window, Mapping) else window
        # q k^T / sqrt(d) is what a softmax sees; half of that scale is on each side.
        start = torch.eye(width).expand(heads, width, width) * width**-0.25
        self.query_map, self.key_map = (nn.Parameter(start.clone(), requires_grad=False) for _ in range(2))
        joined = not added and (text or self.window is not None)
        self.gain = nn.Parameter(torch.zeros(heads), requires_grad=False) if joined else None
        self.projection = nn.Parameter(torch.zeros(heads, width, width), requires_grad=False) if added else None
        self.locality = nn.Parameter(torch.zeros(heads * width, 1, 3, 3), requires_grad=False) if locality else None
        self.channelwise = added or locality

    def form(self) -> LinearForm:
        """What it computes with the parameters as they are."""
        return LinearForm(
            self.features, self.query_map, self.key_map, self.window, self.gain, self.projection, self.locality
        )

    def attention(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        return linear_attention(query, key, value, grid, scale, self.form())

    def start_gain(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        """The gain [h] with which the linear part weighs what softmax gave to keys that are not under it any more, in the
        geometric mean over queries.
        """
        image_query, _ = grid.parted(query)
        scores = image_query @ key.transpose(-1, -2) * scale
        near = softmax_mass(query, key, value, grid, self.window, scale)
        assert near.largest is not None
        largest = scores.amax(-1, keepdim=True)
        every = (scores - largest).exp().sum(-1, keepdim=True)
        far = every - near.total * (near.largest - largest).exp()
        far = far.clamp_min(NOISE * every)  # below that is what rounding left
        linear = image_mass(query, key, value, grid, self.form()).total.clamp_min(TINY)
        return (far.log() + largest - near.largest - linear.log()).mean((0, 2, 3))

    def macs(self, grid: Grid) -> int:
        channels, image, text = self.heads * self.width, grid.image, grid.text
        number = 2 * self.width if self.features == "softmax" else self.width
        maps, sums = 2 * image * channels * self.width, 2 * image * channels * number
        window = 0 if self.window is None else self.window.keys_a_query(*grid.sides)
        exact = 2 * channels * (image * (text + window) + text * (text + image))
        return maps + sums + exact + (image * channels * (self.width * self.added + 9 * (self.locality is not None)))

    def settings(self) -> dict[str, Any]:
        window = None if self.window is None else self.window.spec()
        found = {"features": self.features, "window": window, "added": self.added}
        return {**found, "locality": self.locality is not None}

    def extra_repr(self) -> str:
        return f"{self.features}{', added' if self.added else ''}"
