"""A denoiser compiled block by block: equal blocks share one compilation, so that it takes as long for 57 of them as for two.

Blocks are the members of the outermost lists of modules, whatever the model calls them; each is traced whole. What stands
around them, embeddings and the last norm, runs as torch's own operators: it is little, and a recorded call (captured.py)
has no Python in it either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES = 256  # combinations of shapes that something may be called with; torch would refuse the ninth

Forward = Callable[..., Any]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model, by name; a model without any is one itself, named ""."""
    found: dict[str, nn.Module] = {}

    def look(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            place = f"{name}.{child_name}" if name else child_name
            if isinstance(module, nn.ModuleList):
                found[place] = child
            else:
                look(child, place)

    look(model, "")
    return found or {"": model}


def in_blocks(model: nn.Module, compile_block: Callable[[str, Forward], Forward]) -> Forward:
    """The model's call with what `compile_block` makes of (name, forward) in the place of each block's forward, in place."""
    blocks = blocks_of(model)
    if list(blocks) == [""]:
        call = compile_block("", model)
    else:
        call = model
        for name, block in blocks.items():
            block.forward = _by_channels(compile_block(name, block.forward))
    return with_limits(call, len(blocks))


def _by_channels(forward: Forward) -> Forward:
    """`forward`, given tensors in which channels lie side by side.

    The first block often gets the patches of a convolution, transposed, and would be compiled for these alone.
    """

    def call(*arguments: Any, **keywords: Any) -> Any:
        return forward(*map(_laid, arguments), **{name: _laid(value) for name, value in keywords.items()})

    return call


def _laid(value: Any) -> Any:
    beside = not isinstance(value, Tensor) or value.dim() < 2 or value.stride(-1) == 1
    return value if beside else value.contiguous()


def with_limits(call: Forward, blocks: int = 1) -> Forward:
    """`call`, during which torch compiles each of that many blocks for as many combinations of shapes as there may be."""
    most = SIZES * blocks

    def limited(*arguments: Any, **keywords: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=most, accumulated_recompile_limit=most):
            return call(*arguments, **keywords)

    return limited
