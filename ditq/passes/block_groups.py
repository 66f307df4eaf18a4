"""Groups of consecutive blocks of which some are left out."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.parts import Carried


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of one stack, of which `keep` neighbours run, and what each hands on."""

    blocks: tuple[str, ...]
    keep: int
    carried: Carried

    @property
    def windows(self) -> list[tuple[bool, ...]]:
        """All ways to choose them: a truth value a block."""
        count = len(self.blocks)
        starts = range(count - self.keep + 1)
        return [tuple(start <= place < start + self.keep for place in range(count)) for start in starts]


def grouped(graph: DiTGraph, patterns: Sequence[str], size: int, keep: int, who: str) -> list[BlockGroup]:
    """The blocks of the stacks that match, `size` of them a group.

    What is left over at the end of a stack stays as it is, and so do blocks that cannot be left out (`Block.carried`).

    Raises:
        DitqError: a pattern that matches no stack; a stack with fewer than `size` blocks that can be left out.
    """
    stacks: dict[str, list[str]] = {}
    for block in graph.blocks.values():
        stacks.setdefault(block.stack, []).append(block.name)
    wanted: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(stacks, pattern)
        if not matching:
            raise DitqError(f"pass '{who}': {pattern!r} matches no stack of blocks; there are {', '.join(stacks)}")
        wanted.update(matching)
    found: list[BlockGroup] = []
    for stack, blocks in stacks.items():
        if stack not in wanted:
            continue
        fitting = {block: each for block in blocks if (each := graph.blocks[block].carried) is not None}
        names = list(fitting)
        if len(names) < size:
            raise DitqError(
                f"pass '{who}': {stack} has {len(blocks)} blocks, of which {len(names)} can be left out: fewer than "
                f"group: {size}"
            )
        starts = range(0, len(names) - size + 1, size)
        found += [BlockGroup(tuple(names[start : start + size]), keep, fitting[names[start]]) for start in starts]
    return found
