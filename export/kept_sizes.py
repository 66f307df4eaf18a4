"""Forwards of diffusers that turn a size of their input into a number while they are traced, said so that it may vary.

Chroma's time embedding makes a list of as many zeros as there are samples, `torch.tensor([0] * batch_size)`: traced, that is
the example's number of samples for good, and an engine for two samples draws neither one picture nor three.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def _chroma_time(part: Any, timestep: Tensor) -> Tensor:
    """The same as the class's own: each sample's time and a guidance of 0, beside each modulation's number."""
    batch, modulations = timestep.shape[0], part.mod_proj.shape[0]
    of_none = part.guidance_proj(torch.zeros(1, device=timestep.device)).to(timestep.dtype)  # a constant
    time = torch.cat([part.time_proj(timestep).to(timestep.dtype), of_none.expand(batch, -1)], dim=1)
    numbers = part.mod_proj.to(time.device, time.dtype).repeat(batch, 1, 1)
    return torch.cat([time.unsqueeze(1).repeat(1, modulations, 1), numbers], dim=-1)


# Class -> (what of its source fixes a size, the forward without it). A class that no longer says so keeps its own forward.
_FORWARDS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "ChromaCombinedTimestepTextProjEmbeddings": ("[0] * batch_size", _chroma_time),
}


@contextmanager
def keeping_sizes(model: nn.Module) -> Iterator[None]:
    """Within it such parts of `model` run the other forward, which computes the same."""
    changed = []
    for part in model.modules():
        name = type(part).__name__
        if name in _FORWARDS and _FORWARDS[name][0] in inspect.getsource(type(part).forward):
            part.forward = partial(_FORWARDS[name][1], part)
            changed.append(part)
    try:
        yield
    finally:
        for part in changed:
            del part.forward
