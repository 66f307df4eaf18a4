"""AttentionRounding: rounds what an attention multiplies, wherever its module calls scaled_dot_product_attention.

All attentions of diffusers end in that function of torch, whichever processor prepares their queries, keys and values. So
nothing of the module is replaced: while its forward runs, the call is answered by numerics/attention_rounding.py instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ditq.nn.quant_linear import Rounding
from ditq.numerics.attention_rounding import AttentionFormat, rounded_attention

ATTRIBUTE = "attention_rounding"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AttentionRounding(nn.Module):
    """softmax(q k^T scale + mask) v with rounded parts, as a part of the attention module `site`.

    `rounding` is asked for the part `q` as `<site>/q`, and so on. `watch`, where set, is given each result and what would
    have come out without rounding.
    """

    def __init__(self, site: str, form: AttentionFormat) -> None:
        super().__init__()
        self.site, self.form = site, form
        self.exporting = False
        self.rounding: Rounding | None = None
        self.watch: Callable[[Tensor, Tensor], None] | None = None
        self.running: list[TorchFunctionMode] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if query.dim() != 4 or query.shape[:2] != key.shape[:2]:
            raise ValueError(f"{self.site}: attention is rounded for as many heads of keys as of queries")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        form, rounding = self.form, self.rounding
        if self.exporting:
            return torch.ops.ditq.rounded_attention(
                query, key, value, mask, self.site, form.number, form.parts, form.smooth_keys, scale
            )
        take = None if rounding is None else lambda part, steps: rounding(f"{self.site}/{part}", steps)
        y = rounded_attention(query, key, value, mask, scale, form, take)
        if self.watch is not None:
            self.watch(y, F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale))
        return y

    def spec(self) -> dict[str, Any]:
        """As JSON, without the site."""
        return asdict(self.form)

    def extra_repr(self) -> str:
        smooth = ", smooth keys" if self.form.smooth_keys and "k" in self.form.parts else ""
        return f"{self.form.number} {self.form.parts}{smooth}"


def attach(attention: nn.Module, site: str, form: AttentionFormat) -> AttentionRounding:
    """Round what `attention`, the module at `site`, multiplies from now on; once a module."""
    rounding = AttentionRounding(site, form)
    attention.add_module(ATTRIBUTE, rounding)
    attention.register_forward_pre_hook(_enter)
    attention.register_forward_hook(_leave, always_call=True)
    return rounding


# The hooks find the rounding on the module that runs, so that a copy of a model rounds by itself.


def _enter(attention: nn.Module, _: Any) -> None:
    rounding = attention.get_submodule(ATTRIBUTE)
    assert isinstance(rounding, AttentionRounding)
    mode = _Intercept(rounding)
    mode.__enter__()
    rounding.running.append(mode)


def _leave(attention: nn.Module, _: Any, __: Any) -> None:
    rounding = attention.get_submodule(ATTRIBUTE)
    assert isinstance(rounding, AttentionRounding)
    if rounding.running:  # none where an earlier hook failed
        rounding.running.pop().__exit__(None, None, None)


class _Intercept(TorchFunctionMode):
    """Hands calls of scaled_dot_product_attention to a rounding."""

    def __init__(self, rounding: AttentionRounding) -> None:
        super().__init__()
        self.rounding = rounding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if given.get("is_causal") or given.get("dropout_p"):
            raise ValueError(
                f"{self.rounding.site}: attention is rounded only if it is neither causal nor with dropout"
            )
        query, key, value = (given[name] for name in _ARGUMENTS[:3])
        return self.rounding(query, key, value, given.get("attn_mask"), given.get("scale"))


@custom_op("ditq::rounded_attention", mutates_args=())
def _rounded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    site: str,
    number: str,
    parts: str,
    smooth_keys: bool,
    scale: float,
) -> Tensor:
    """The opaque node that stands for a rounded attention in an exported graph; only its shape is ever computed."""
    raise RuntimeError(f"{site}: ditq::rounded_attention exists only in exported graphs")


@_rounded_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    site: str,
    number: str,
    parts: str,
    smooth_keys: bool,
    scale: float,
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
