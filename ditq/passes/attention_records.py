"""What attentions get while the model runs on recorded calls, how well a part answers for one, and the fit of such a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.calibration.batches import CallBatch
from ditq.nn.answered_attention import AnswersAttention, answer
from ditq.nn.structural.token_attention import TokenAttention, attach
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.passes.block_records import call, tensors_of

RATE = 0.02  # of Adam, for parameters whose natural size is 1
HELD_OUT = 4  # one of so many records judges the fit


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One call of an attention: query, key, value [B, h, N, d], the grid of its tokens and what it gave [B, h, N, d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    grid: Grid
    output: Tensor


class _Listener(AnswersAttention):
    def __init__(self, site: str, grid: Grid) -> None:
        super().__init__(site)
        self.grid = grid
        self.found: list[AttentionRecord] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        self.found.append(AttentionRecord(query, key, value, scale, self.grid, output))
        return output


@torch.no_grad()
def records_of(
    model: nn.Module, site: str, batches: Sequence[CallBatch], layout: TokenLayout, text: bool
) -> list[AttentionRecord]:
    """What the attention at `site` gets and gives for each batch; `text`: whether its tokens have text among them."""
    found: list[AttentionRecord] = []
    for batch in batches:
        grid = layout.grid(batch.arguments)
        listener = _Listener(site, grid if text else grid.without_text())
        undo = answer(model.get_submodule(site), "listener", listener)
        try:
            call(model, batch)
        finally:
            undo()
        found += listener.found
    return found


@contextmanager
def attached(model: nn.Module, part: TokenAttention) -> Iterator[None]:
    """Within it the part answers for its attention."""
    undo = attach(model, part)
    try:
        yield
    finally:
        undo()


def answers(model: nn.Module, batches: Sequence[CallBatch]) -> list[Tensor]:
    """What the model gives for each batch."""
    return [tensors_of(call(model, batch))[0] for batch in batches]


def difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """||wanted - found||^2 / ||wanted||^2 over all tensors, in float64."""
    lost = sum(float((w.double() - f.double()).square().sum()) for w, f in zip(wanted, found, strict=True))
    return lost / max(sum(float(w.double().square().sum()) for w in wanted), 1e-300)


@torch.no_grad()
def part_error(part: TokenAttention, records: Sequence[AttentionRecord]) -> float:
    """How far the part's outputs are from those of the attention that it answers for."""
    found = [part.attention(r.query, r.key, r.value, r.grid, r.scale) for r in records]
    return difference([record.output for record in records], found)


@torch.no_grad()
def head_part_errors(part: TokenAttention, records: Sequence[AttentionRecord]) -> np.ndarray:
    """The squared error of each head's outputs, summed over all records: float64 [h]."""
    found = (part.attention(r.query, r.key, r.value, r.grid, r.scale).double() for r in records)
    lost = [(r.output.double() - y).square().sum((0, 2, 3)) for r, y in zip(records, found, strict=True)]
    return np.asarray(torch.stack(lost).sum(0))


def fit_part(part: TokenAttention, records: Sequence[AttentionRecord], steps: int, seed: int) -> None:
    """Fit the part's own parameters to what the attention gave, and keep them only if they help on records not fitted to.

    The loss is the mean absolute difference, as for attentions in Grafting (Chandrasegaran 2025, arXiv 2506.05340).
    """
    parameters = list(part.parameters())
    held_out = records[::HELD_OUT] if len(records) > 1 else records
    fitted = [record for number, record in enumerate(records) if number % HELD_OUT] or list(records)
    start = [parameter.detach().clone() for parameter in parameters]
    before = part_error(part, held_out)
    order = torch.randint(len(fitted), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(parameters, RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for number in order:
            r = fitted[number]
            lost = (part.attention(r.query, r.key, r.value, r.grid, r.scale) - r.output).abs().mean()
            optimizer.zero_grad()
            lost.backward()
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    after = part_error(part, held_out)
    if not after < before:
        for parameter, tensor in zip(parameters, start, strict=True):
            parameter.copy_(tensor)
