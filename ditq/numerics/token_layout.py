"""Where the picture or video lies among the tokens of an attention: which are text; frames, rows and columns of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ditq.numerics.token_order import TokenOrder, is_size


@dataclass(frozen=True)
class Grid:
    """Of one call: `text` tokens beside `height` x `width` image tokens, row by row or in another `order`, of one frame after
    the other; text stands first, or last. A picture is one frame.

    While a model is exported the numbers are int64 tensors [1], for the picture may have any size at run time, and `moved` is
    what the order lists and where its tokens went (numerics/token_order.py), int64 [FHW].
    """

    text: Any
    height: Any
    width: Any
    text_first: bool = True
    frames: Any = 1
    order: TokenOrder | None = None
    moved: tuple[Tensor, Tensor] | None = None

    def __str__(self) -> str:
        frames = "" if self.frames == 1 else f"{self.frames} frames of "
        return f"{frames}{self.height} x {self.width}"

    @property
    def sides(self) -> tuple[Any, Any, Any]:
        """Frames, rows and columns."""
        return self.frames, self.height, self.width

    @property
    def image(self) -> Any:
        """Number of image tokens."""
        return self.frames * self.height * self.width

    def without_text(self) -> Grid:
        """Of an attention among image tokens alone."""
        return replace(self, text=0 * self.text)

    def parted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[.., N, d] -> (image tokens [.., FHW, d], text tokens [.., N - FHW, d])."""
        first, last = tokens.split([self.text, self.image] if self.text_first else [self.image, self.text], dim=-2)
        return (last, first) if self.text_first else (first, last)

    def joined(self, image: Tensor, text: Tensor) -> Tensor:
        """What `parted` took apart."""
        return torch.cat([text, image] if self.text_first else [image, text], dim=-2)


@dataclass(frozen=True)
class TokenLayout:
    """How to read a grid off the arguments of a model's forward, which differ from call to call.

    Attributes:
        latents: the argument that holds the picture, [B, C, H, W], or [B, tokens, C] where there are `positions`; the video,
            [B, C, F, H, W].
        patch: rows and columns of latents that one token stands for.
        positions: the argument that holds rows and columns of the image tokens, [tokens, >= 3], in columns 1 and 2.
        text: the argument that holds text tokens, [B, tokens, C], which joint attention sees beside the picture.
        text_first: whether they stand in front of the image tokens.
        frames: frames of latents that one token stands for; 0: they are pictures.
        rotary: the module that makes rotary embeddings of the image tokens of the latents' shape; None where there are none, or
            they are made of `positions`.
        order: that of the image tokens between the model's first block and its last; None: row by row.
    """

    latents: str = "hidden_states"
    patch: int = 1
    positions: str | None = None
    text: str | None = None
    text_first: bool = True
    frames: int = 0
    rotary: str | None = None
    order: TokenOrder | None = None

    def __post_init__(self) -> None:
        names = (self.positions, self.text, self.rotary)
        if not isinstance(self.latents, str) or not all(name is None or isinstance(name, str) for name in names):
            raise ValueError(f"arguments and modules are told by their names, not by {(self.latents, *names)}")
        if not is_size(self.patch) or not (self.frames == 0 or is_size(self.frames)):
            raise ValueError(
                f"a token stands for whole rows, columns and frames, not for {self.patch} and {self.frames}"
            )

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> TokenLayout:
        """What `asdict` made JSON of.

        Raises:
            AttributeError, TypeError, ValueError: it is something else.
        """
        order = spec.get("order")
        if order is not None:
            picture = order.get("picture")
            order = TokenOrder(**{**order, "picture": None if picture is None else tuple(picture)})
        return cls(**{**spec, "order": order})

    def grid(self, arguments: Mapping[str, Any]) -> Grid:
        """The grid of a call. Where values of positions cannot be read (fake tensors), the squarest of that many tokens."""
        text = 0 if self.text is None else arguments[self.text].shape[1]
        frames = 1
        if self.positions is None:
            frames, height, width = self._sides(arguments)
        else:
            places = arguments[self.positions][..., 1:3]
            if isinstance(places, FakeTensor):
                height = next(n for n in range(isqrt(places.shape[0]), 0, -1) if places.shape[0] % n == 0)
                width = places.shape[0] // height
            else:
                height, width = (int(size) for size in sides(places))
        return Grid(text, height, width, self.text_first, frames, self.order)

    def _sides(self, arguments: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        shape = arguments[self.latents].shape
        frames = shape[-3] // self.frames if self.frames else 1
        return frames, shape[-2] // self.patch, shape[-1] // self.patch

    def cut(self, arguments: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
        """Arguments of a larger picture, with the first rows and columns of it that make one of height x width tokens."""
        found = dict(arguments)
        if self.positions is None:
            found[self.latents] = arguments[self.latents][..., : height * self.patch, : width * self.patch]
        else:
            places = arguments[self.positions]
            inside = (places[..., 1] < height) & (places[..., 2] < width)
            found |= {self.positions: places[inside], self.latents: arguments[self.latents][:, inside]}
        return found

    def traced_grid(self, arguments: Mapping[str, Any]) -> Grid:
        """The same with tensors [1] for numbers, made by operators that an exported graph keeps."""
        device = arguments[self.latents].device

        def number(size: Any) -> Tensor:
            return torch.full((1,), size, dtype=torch.int64, device=device)

        text = number(0 if self.text is None else arguments[self.text].shape[1])
        frames = number(1)
        if self.positions is None:
            frames, height, width = (number(size) for size in self._sides(arguments))
        else:
            both = sides(arguments[self.positions][..., 1:3])
            height, width = both[:1], both[1:]
        moved = None
        if self.order is not None:
            count = arguments[self.latents].shape[1] if self.positions else prod(self._sides(arguments))
            moved = self.order.traced(count, height, width)
        return Grid(text, height, width, self.text_first, frames, self.order, moved)


def sides(places: Tensor) -> Tensor:
    """Rows and columns that positions [.., 2] span: int64 [2]."""
    flat = places.reshape(-1, 2)
    return (flat.amax(0) - flat.amin(0)).to(torch.int64) + 1
