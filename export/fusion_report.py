"""What became of the planned low-bit products, in whatever way a target finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FusionReport:
    """fused: sites whose products low-bit kernels make, with the kernel's name; not_fused: the others, with what makes one.

    A site counts once, however many products it has: a second one for a branch, one for each group of channels.
    unplanned: products that the runtime makes and that stand nowhere in the engine's graph, with what they multiply.
    kernels: what low-bit kernels are called here.
    """

    planned: int
    fused: Mapping[str, str]
    not_fused: Mapping[str, str]
    unplanned: Mapping[str, str] = field(default_factory=dict)
    kernels: str = "integer"

    @property
    def complete(self) -> bool:
        return not self.not_fused and not self.unplanned

    @property
    def counted(self) -> str:
        return f"{len(self.fused)} of {self.planned} planned {self.kernels} products run as {self.kernels} kernels"

    def __str__(self) -> str:
        parts = [self.counted]
        if self.not_fused:
            parts.append("not fused: " + ", ".join(f"{site} ({kernel})" for site, kernel in self.not_fused.items()))
        if self.unplanned:
            parts.append("unplanned: " + ", ".join(f"{name} ({types})" for name, types in self.unplanned.items()))
        return "; ".join(parts)
