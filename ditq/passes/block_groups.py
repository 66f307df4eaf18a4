"""Groups of consecutive blocks, and what a block hands on: which of its arguments each thing that it returns replaces."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils._pytree import tree_leaves

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.trace import Trace, Value, trace_forward


@dataclass(frozen=True)
class Carried:
    """What a block needs where it does not run: its arguments in order, the argument that each returned tensor is the next
    value of, their widths, and whether it returns one tensor alone.
    """

    arguments: tuple[str, ...]
    names: tuple[str, ...]
    widths: tuple[int, ...]
    bare: bool


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of one stack, of which `keep` neighbours run."""

    blocks: tuple[str, ...]
    keep: int
    carried: Carried

    @property
    def windows(self) -> list[tuple[bool, ...]]:
        """All ways to choose them: a truth value a block."""
        count = len(self.blocks)
        return [
            tuple(start <= place < start + self.keep for place in range(count))
            for start in range(count - self.keep + 1)
        ]


def grouped(graph: DiTGraph, patterns: Sequence[str], size: int, keep: int, who: str) -> list[BlockGroup]:
    """The blocks of the stacks that match, `size` of them a group; what is left over at the end of a stack stays as it is, and
    so do blocks that return something else than the others or of which the model uses a part elsewhere.

    Raises:
        DitqError: a pattern that matches no stack; a stack whose blocks do not hand on all that they return, or that has
            fewer than `size` blocks that do.
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
    trace = trace_forward(graph.model, graph.example_inputs)
    found: list[BlockGroup] = []
    for stack, blocks in stacks.items():
        if stack not in wanted:
            continue
        if len(blocks) < size:
            raise DitqError(f"pass '{who}': {stack} has {len(blocks)} blocks, fewer than group: {size}")
        carried = _carried(trace, blocks)
        if carried is None:
            raise DitqError(
                f"pass '{who}': the blocks of {stack} do not hand on what they return from one to the next; "
                "leave it out of select"
            )
        fitting = [
            block for block in blocks if _returns(trace, block) == len(carried.names) and _by_itself(trace, block)
        ]
        starts = range(0, len(fitting) - size + 1, size)
        if not starts:
            raise DitqError(
                f"pass '{who}': {stack} has {len(fitting)} blocks that can be grouped, fewer than group: {size}"
            )
        found += [BlockGroup(tuple(fitting[start : start + size]), keep, carried) for start in starts]
    return found


def _returns(trace: Trace, block: str) -> int:
    """How many tensors a block returns; -1 where not everything that it returns is one."""
    leaves = tree_leaves(trace.module_outputs[block])
    return len(leaves) if all(isinstance(leaf, Value) for leaf in leaves) else -1


def _by_itself(trace: Trace, block: str) -> bool:
    """Does no one else use a part of the block? DiT embeds the timestep anew by a part of its first one."""
    within = f"{block}."
    return all(f"{caller}.".startswith(within) for name, caller in trace.called_by.items() if name.startswith(within))


def _carried(trace: Trace, blocks: Sequence[str]) -> Carried | None:
    """Read off the first two blocks: what the first returns, the second gets."""
    if len(blocks) < 2 or _returns(trace, blocks[0]) < 1:
        return None
    returned: list[Value] = tree_leaves(trace.module_outputs[blocks[0]])
    next_ones = trace.module_inputs[blocks[1]]
    names = {value: name for name, value in next_ones.items() if isinstance(value, Value)}
    if any(value not in names or len(value.shape) != 3 for value in returned):
        return None
    bare = isinstance(trace.module_outputs[blocks[0]], Value)
    return Carried(
        tuple(next_ones), tuple(names[value] for value in returned), tuple(value.shape[-1] for value in returned), bare
    )
