"""TokenAttention: an attention that knows where the picture lies among its tokens, as a part of the attention's module.

It answers for scaled_dot_product_attention (nn/answered_attention.py). Before each call of the model a hook reads off its
arguments how many tokens are text and how many frames, rows and columns the picture or video has.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.overrides import handle_torch_function, has_torch_function

from ditq.nn.answered_attention import AnswersAttention, answer, unanswer
from ditq.nn.structural import StructuralPart
from ditq.numerics.local_attention import temperature
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.numerics.token_order import is_size

NAME = "token_attention"
_MARK = "ditq_tells_its_grid"


class TokenAttention(AnswersAttention, StructuralPart):
    """What softmax(q k^T scale) v became, for heads of a known number and width.

    Args:
        site: the attention's module.
        layout: how to read the grid of a call.
        heads, width: number of heads, and channels of each.
        text: whether text tokens are among the attention's.
        usual: tokens of the calls that it was made for; above them scores are multiplied by `temperature`. 0: never.
    """

    fitted_by = "l1"
    channelwise = False
    """Whether channels of a head are treated differently, or weights of the tokens may add up to something other than 1."""

    def __init__(self, site: str, layout: TokenLayout, heads: int, width: int, text: bool, usual: int) -> None:
        super().__init__(site)
        if not (is_size(heads) and is_size(width) and (usual == 0 or is_size(usual))):
            raise ValueError(
                f"{site}: {heads} heads of {width} channels, usually over {usual} tokens, are no attention"
            )
        self.layout, self.heads, self.width, self.text, self.usual = layout, heads, width, text, usual
        self.what = self.kind.replace("_", " ")
        self.exporting = False
        self.grid: Grid | None = None

    @abstractmethod
    def attention(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        """query, key, value [B, h, N, d] -> [B, h, N, d]."""

    @abstractmethod
    def macs(self, grid: Grid) -> int:
        """Multiply-adds of all heads for one sample."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """As JSON, the arguments of the constructor behind `usual`."""

    def tensors(self) -> list[Tensor]:
        """Its parameters and indices (int32), in the order in which an export target reads them."""
        return list(self.parameters())

    def spec(self) -> dict[str, Any]:
        common = {"heads": self.heads, "width": self.width, "text": self.text, "usual": self.usual}
        return {"layout": asdict(self.layout), **common, **self.settings()}

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        site = place.rpartition(".")[0]
        part = cls(site, **{**spec, "layout": TokenLayout.from_spec(spec["layout"])})
        attach(model, part)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        grid = self.grid
        if grid is None:
            raise ValueError(f"{self.site}: the whole model must be called, for it tells the size of the picture")
        if mask is not None or query.shape != key.shape or query.shape[1::2] != (self.heads, self.width):
            raise ValueError(f"{self.site}: {self.what} is for tokens that attend to each other without a mask")
        scale = self.width**-0.5 if scale is None else scale
        if self.exporting:
            where = [grid.text, grid.height, grid.width, grid.frames, *(grid.moved or ())]
            common = {"heads": self.heads, "width": self.width, "text": self.text, "usual": self.usual}
            order = {} if grid.order is None else {"order": asdict(grid.order)}
            settings = json.dumps({**self.settings(), **common, "text_first": grid.text_first, **order})
            return torch.ops.ditq.token_attention(
                query, key, value, where, self.tensors(), self.site, self.kind, settings, scale
            )
        if grid.text + grid.image != query.shape[2]:
            raise ValueError(
                f"{self.site}: {query.shape[2]} tokens are not {grid.text} of text and {grid} of a picture; {self.what} "
                "runs for other inputs than it was made for"
            )
        if self.usual:
            scale *= temperature(query.shape[2], self.usual)
        attention = channel_attention if self.channelwise else token_attention
        return attention(query, key, value, part=self, grid=grid, scale=scale)


def attach(model: nn.Module, part: TokenAttention) -> Callable[[], None]:
    """Let `part` answer for the attention of `model` at its site, and `model` tell it the grid of each call.

    What takes it off again is returned.
    """
    undo = answer(model.get_submodule(part.site), NAME, part)
    if not getattr(model, _MARK, False):
        setattr(model, _MARK, True)
        model.register_forward_pre_hook(_tell_grid, with_kwargs=True)
    return undo


def token_attentions(model: nn.Module) -> dict[str, TokenAttention]:
    """Those of a model, by the module that they are part of."""
    return {part.site: part for part in model.modules() if isinstance(part, TokenAttention)}


def detach_all(model: nn.Module) -> dict[str, TokenAttention]:
    """Take all of them off `model`, which then computes torch's own attention; they are returned, by their site."""
    found = token_attentions(model)
    for site in found:
        unanswer(model.get_submodule(site))
    for number, hook in list(model._forward_pre_hooks.items()):
        if hook is _tell_grid:
            del model._forward_pre_hooks[number]
    return found


def _tell_grid(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    tell(token_attentions(model).values(), signature(model.forward).bind(*arguments, **keywords).arguments)


def tell(parts: Iterable[TokenAttention], given: Mapping[str, Any]) -> None:
    """Tell parts the grid of a call of their model, of its arguments by name."""
    grids: dict[tuple[TokenLayout, bool], Grid] = {}
    for part in parts:
        key = (part.layout, part.exporting)
        if key not in grids:
            grids[key] = part.layout.traced_grid(given) if part.exporting else part.layout.grid(given)
        part.grid = grids[key] if part.text else grids[key].without_text()


# A trace of the model (ditq/trace.py) records each of these as one function, like torch's own attention.


def token_attention(
    query: Tensor, key: Tensor, value: Tensor, *, part: TokenAttention, grid: Grid, scale: float
) -> Tensor:
    """Values mixed by weights that add up to 1 and are the same for all channels of a head."""
    if has_torch_function((query, key, value)):
        return handle_torch_function(
            token_attention, (query, key, value), query, key, value, part=part, grid=grid, scale=scale
        )
    return part.attention(query, key, value, grid, scale)


def channel_attention(
    query: Tensor, key: Tensor, value: Tensor, *, part: TokenAttention, grid: Grid, scale: float
) -> Tensor:
    """Values mixed in any other way: no matrix of a head and no shift can be moved through it."""
    if has_torch_function((query, key, value)):
        return handle_torch_function(
            channel_attention, (query, key, value), query, key, value, part=part, grid=grid, scale=scale
        )
    return part.attention(query, key, value, grid, scale)


@custom_op("ditq::token_attention", mutates_args=())
def _token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: list[Tensor],
    tensors: list[Tensor],
    site: str,
    kind: str,
    settings: str,
    scale: float,
) -> Tensor:
    """The opaque node that stands for a TokenAttention in an exported graph; only its shape is ever computed."""
    raise RuntimeError(f"{site}: ditq::token_attention exists only in exported graphs")


@_token_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: list[Tensor],
    tensors: list[Tensor],
    site: str,
    kind: str,
    settings: str,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape)
