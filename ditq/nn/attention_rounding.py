"""AttentionRounding: rounds what an attention multiplies, wherever its module calls scaled_dot_product_attention.

The call is answered by numerics/attention_rounding.py instead (nn/answered_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F

from ditq.nn.answered_attention import AnswersAttention, answer
from ditq.nn.quant_linear import Rounding
from ditq.numerics.attention_rounding import LARGEST, AttentionFormat, rounded_attention, turned
from ditq.numerics.uniform import SMALLEST_SCALE

ATTRIBUTE = "attention_rounding"


class AttentionRounding(AnswersAttention):
    """softmax(q k^T scale + mask) v with rounded parts, as a part of the attention module `site`.

    `rounding` is asked for the part `q` as `<site>/q`, and so on. `watch`, where set, is given each result and what would
    have come out without rounding.
    """

    what = "rounded"

    def __init__(self, site: str, form: AttentionFormat) -> None:
        super().__init__(site)
        self.form = form
        self.exporting = False
        self.rounding: Rounding | None = None
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if query.dim() != 4 or query.shape[:2] != key.shape[:2]:
            raise ValueError(f"{self.site}: attention is rounded for as many heads of keys as of queries")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        form, rounding = self.form, self.rounding
        if self.exporting:
            return torch.ops.ditq.rounded_attention(
                query,
                key,
                value,
                mask,
                self.site,
                form.number,
                form.parts,
                form.smooth_keys,
                form.scales,
                form.rotate,
                scale,
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
        static = ", static scales" if self.form.scales else ""
        turned = ", rotated" if self.form.turns else ""
        return f"{self.form.number} {self.form.parts}{smooth}{static}{turned}"


def attach(attention: nn.Module, site: str, form: AttentionFormat) -> AttentionRounding:
    """Round what `attention`, the module at `site`, multiplies from now on; once a module."""
    rounding = AttentionRounding(site, form)
    answer(attention, ATTRIBUTE, rounding)
    return rounding


class LargestNumbers(AnswersAttention):
    """Computes the attention as it is, and remembers the largest number of its queries, of its keys and of its values.

    rotate: of the rotated queries and keys.
    """

    what = "watched"

    def __init__(self, site: str, rotate: bool) -> None:
        super().__init__(site)
        self.rotate = rotate
        self.largest = [0.0, 0.0, 0.0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        rounded = (turned(query), turned(key), value) if self.rotate else (query, key, value)
        found = (float(x.abs().max()) for x in rounded)
        self.largest = [max(pair) for pair in zip(self.largest, found, strict=True)]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def scales(self, number: str, margin: float) -> tuple[float, ...]:
        """Static scales of q, k and v that reach `margin` times those numbers."""
        return tuple(max(margin * x / LARGEST[number], SMALLEST_SCALE) for x in self.largest)


@contextmanager
def watched(model: nn.Module, sites: Iterable[str], rotate: bool = False) -> Iterator[dict[str, LargestNumbers]]:
    """Within it the attentions of these modules are watched."""
    found = {site: LargestNumbers(site, rotate) for site in sites}
    undo = [answer(model.get_submodule(site), "watching", part) for site, part in found.items()]
    try:
        yield found
    finally:
        for each in undo:
            each()


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
    scales: Sequence[float],
    rotate: bool,
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
    scales: Sequence[float],
    rotate: bool,
    scale: float,
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
