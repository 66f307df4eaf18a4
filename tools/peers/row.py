"""What a row of the comparison is: a peer with one setting, applied to a bench; and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from tools.peers.bench import Bench


@dataclass(frozen=True)
class Outcome:
    """A quantized model.

    Attributes:
        model: takes the transformer's place; a module stands at each token linear's old name where that still exists.
        stored: quantized linear -> bits stored for its weight in all: codes, scales, zero points, tables, low-rank branches.
        online: linear -> bits of what acts on its input at run time and was found from data: scales, rotations.
        note: what a reader of the table should know.
    """

    model: nn.Module
    stored: Mapping[str, float]
    online: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: unique; begins with the peer's name.
        peer: whose method it is; "ditq" for the recipes under test.
        activation: bits of the activations (16: floating point).
        apply: quantizes the bench's model; called in a fresh process.
        settings: what else distinguishes a cached result, as JSON.
    """

    name: str
    peer: str
    activation: int
    apply: Callable[[Bench], Outcome]
    settings: Any = None


_rows: dict[str, Row] = {}


def add(name: str, peer: str, activation: int, apply: Callable[[Bench], Outcome], settings: Any = None) -> None:
    """Register a row. Raises ValueError for a name that is taken."""
    if name in _rows:
        raise ValueError(f"two rows are called {name!r}")
    _rows[name] = Row(name, peer, activation, apply, settings)


def rows() -> dict[str, Row]:
    """All rows by name, in the order of the table: ditq's last."""
    import tools.peers.methods  # noqa: F401  registers them

    return dict(sorted(_rows.items(), key=lambda item: item[1].peer == "ditq"))
