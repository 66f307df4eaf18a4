"""What blocks hand on from one to the next, read off the record of a forward: how a block can be left out."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils._pytree import tree_leaves

from ditq.parts import Carried
from ditq.trace import Trace, Value


def carried_by(trace: Trace, blocks: Sequence[str]) -> dict[str, Carried]:
    """Of the blocks of a stack, in order, those that can be left out, with what each would hand on.

    What the first returns, the second gets: that tells which argument each returned tensor is the next value of. Not among
    them are blocks that return something else, and those of which the model uses a part elsewhere.
    """
    if len(blocks) < 2 or any(block not in trace.module_outputs for block in blocks):
        return {}
    returned: list[Value] = tree_leaves(trace.module_outputs[blocks[0]])
    given = trace.module_inputs[blocks[1]]
    names = {value: name for name, value in given.items() if isinstance(value, Value)}
    if not returned or any(value not in names or len(value.shape) != 3 for value in returned):
        return {}
    found = Carried(
        tuple(given),
        tuple(names[value] for value in returned),
        tuple(value.shape[-1] for value in returned),
        isinstance(trace.module_outputs[blocks[0]], Value),
    )
    return {block: found for block in blocks if _returns(trace, block, found) and _by_itself(trace, block)}


def _returns(trace: Trace, block: str, carried: Carried) -> bool:
    leaves = tree_leaves(trace.module_outputs[block])
    return len(leaves) == len(carried.names) and all(isinstance(leaf, Value) for leaf in leaves)


def _by_itself(trace: Trace, block: str) -> bool:
    """Does no one else use a part of the block? DiT embeds the timestep anew by a part of its first one."""
    within = f"{block}."
    return all(f"{caller}.".startswith(within) for name, caller in trace.called_by.items() if name.startswith(within))
