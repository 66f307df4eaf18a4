"""Who answers whom in a mixture of experts, in fixed sizes: each of E experts has C slots for the N tokens of a sample.

Nothing is scattered with a sum: a token's answers are looked up where they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FINENESS = 64  # capacities are kept in 64ths, so that the number of slots is whole arithmetic on the number of tokens
Choice = Literal["token", "expert"]


def slots_of(tokens: int, experts: int, top: int, capacity: int) -> int:
    """Tokens of a sample that one expert answers at most: ceil(N top capacity / E), capacity in 64ths."""
    whole = experts * FINENESS
    return (tokens * top * capacity + whole - 1) // whole


@dataclass(frozen=True, eq=False)
class Routes:
    """What `route` found.

    asked: int64 [B, N, k], the experts of each token's highest scores.
    token: int64 [B, E, C], the token of the sample in each slot, those of the highest scores first.
    used: bool [B, E, C], whether the token asked for it; None where all slots are used.
    place: int64 [B, E, N], where the expert's answer to a token stands among the E C of its sample; E C for no answer.
    """

    asked: Tensor
    token: Tensor
    used: Tensor | None
    place: Tensor

    def rows(self) -> Tensor:
        """int64 [B, E, C]: the token in each slot as a row of the tokens of all samples [B N, D]."""
        samples, tokens = self.asked.shape[:2]
        return self.token + torch.arange(samples, device=self.token.device)[:, None, None] * tokens

    def answers(self) -> Tensor:
        """int64 [B, N, k], or [B, N, E] where experts chose: where the answers to a token stand."""
        place = self.place.transpose(1, 2)
        return place if self.used is None else place.gather(2, self.asked)


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest along the last axis, and where they stand: among equal ones the first, as ONNX has it and `topk` has not.

    Tokens are equal where a text is padded.
    """
    if torch.compiler.is_exporting():
        best, place = values.topk(count, dim=-1)
        return best, place
    best, place = values.sort(dim=-1, descending=True, stable=True)
    return best[..., :count], place[..., :count]


def route(scores: Tensor, top: int, slots: int, choice: str) -> Routes:
    """scores [B, N, E]. `choice`: token, each asks the `top` experts of its highest scores, and those answer the ones of the
    highest score among who asks; expert, each answers the tokens of its highest scores whoever asked.
    """
    samples, _, experts = scores.shape
    asked = _highest(scores, top)[1]
    wanted = scores
    if choice == "token":
        every = torch.arange(experts, device=scores.device)
        asks = (asked[..., None] == every).any(dim=2)
        # In every runtime the same tokens stand in slots that no one asked for: those of the highest scores below 0.
        above = 1 + scores - scores.amin(dim=1, keepdim=True)
        wanted = torch.where(asks, above, -1 / above)
    best, token = _highest(wanted.transpose(1, 2), slots)  # [B, E, C]
    used = best > 0 if choice == "token" else None
    last = experts * slots
    slot = torch.arange(last, device=scores.device).reshape(1, experts, slots)
    if used is not None:
        slot = torch.where(used, slot, last)
    slot = slot.expand(samples, experts, slots)
    nowhere = torch.full_like(scores, last, dtype=torch.int64).transpose(1, 2)
    return Routes(asked, token, used, nowhere.scatter(2, token, slot))
