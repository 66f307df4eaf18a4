"""A block of the model that runs at some timesteps only; at the others it adds what it gives in the mean.

Which timesteps those are is fixed when the model is compiled, so every bin of timesteps has a plain graph of its own,
without a decision in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.nn.answered_attention import AnswersAttention
from ditq.nn.structural import StructuralPart, register
from ditq.numerics.timestep_bins import bins_of


@register
class ScheduledBlock(StructuralPart):
    """block(...) at the timesteps of the bins where `runs` is true; elsewhere its carried arguments, each plus a mean.

    runs: a truth value for each bin of timesteps. edges: between the bins, falling. carried: of each thing that the block
    returns, the argument that it is the next value of. arguments: the names of all, in order. bare: it returns one tensor
    alone. compared: does the original's block of that name give what this one shall?

    A sample of a batch is treated by its own timestep. A block that never runs is not there.

    Source: the mixture of blocks of Dense2MoE (arXiv 2510.09094), with the timestep in the place of a router.
    """

    kind: ClassVar[str] = "scheduled_block"
    fitted_by: ClassVar[None] = None

    def __init__(
        self,
        block: nn.Module,
        *,
        runs: Sequence[bool],
        edges: Sequence[float],
        arguments: Sequence[str],
        carried: Sequence[str],
        widths: Sequence[int],
        bare: bool,
        compared: bool,
    ) -> None:
        super().__init__()
        self.block = block if any(runs) else None
        self.runs, self.edges, self.arguments = list(runs), list(edges), list(arguments)
        self.carried, self.widths, self.bare, self.compared = list(carried), list(widths), bare, compared
        self.timestep: Tensor | None = None  # of the call that runs (call_timestep.py)
        self.always = False  # while a graph is traced that shall hold all parts
        self.fixed: bool | None = None  # while the graph of some bins is exported: whether the block runs there
        like = next(block.parameters())
        shape = {width: torch.zeros(len(self.runs), width, dtype=like.dtype, device=like.device) for width in widths}
        self.means = nn.ParameterList(nn.Parameter(shape[width].clone(), requires_grad=False) for width in widths)

    def forward(self, *positional: Any, **keywords: Any) -> Any:
        given = dict(zip(self.arguments, positional, strict=False)) | keywords
        if self.block is None:
            return self._returned(self._passed(given))
        runs = self._runs()
        if runs is True:
            return self.block(*positional, **keywords)
        if runs is False:
            return self._returned(self._passed(given))
        made = self.block(*positional, **keywords)
        pairs = zip([made] if self.bare else made, self._passed(given), strict=True)
        return self._returned([torch.where(runs[:, None, None], one, other) for one, other in pairs])

    def _runs(self) -> bool | Tensor:
        """For all samples, or for each: bool [B]."""
        if self.always:
            return True
        if self.fixed is not None:
            return self.fixed
        if len(self.runs) == 1:
            return self.runs[0]
        runs = torch.tensor(self.runs, device=self._bins().device)[self._bins()]
        return bool(runs[0]) if bool((runs == runs[0]).all()) else runs

    def _bins(self) -> Tensor:
        """The bin of each sample: int64 [B], or [1] where all have one timestep."""
        if self.timestep is None:
            raise RuntimeError("a block that runs at some timesteps only was called without the model around it")
        return bins_of(self.timestep, self.edges)

    def _passed(self, given: Mapping[str, Any]) -> list[Tensor]:
        """What the block returns where it does not run."""
        found = []
        for name, means in zip(self.carried, self.means, strict=True):
            mean = means[:1] if len(self.runs) == 1 else means[self._bins()]
            found.append(given[name] + mean[:, None])
        return found

    def _returned(self, made: list[Tensor]) -> Any:
        return made[0] if self.bare else tuple(made)

    def spec(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "edges": self.edges,
            "arguments": self.arguments,
            "carried": self.carried,
            "widths": self.widths,
            "bare": self.bare,
            "compared": self.compared,
        }

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        from ditq.nn.call_timestep import tell_at_each_call

        if len(spec["runs"]) != len(spec["edges"]) + 1 or len(spec["carried"]) != len(spec["widths"]):
            raise ValueError(
                f"{place} does not run at as many bins of timesteps as it has, or carries others than it has"
            )
        model.set_submodule(place, cls(model.get_submodule(place), **spec))
        for name, part in model.get_submodule(place).named_modules(prefix=place):
            if isinstance(part, AnswersAttention):  # its attention is one level deeper now
                part.site = name.rpartition(".")[0]
        if len(spec["runs"]) > 1:
            tell_at_each_call(model)


def scheduled_blocks(model: nn.Module) -> dict[str, ScheduledBlock]:
    """Those of a model by place."""
    return {name: part for name, part in model.named_modules() if isinstance(part, ScheduledBlock)}


@contextmanager
def all_blocks(model: nn.Module) -> Iterator[None]:
    """Within it every block of `model` runs, whatever the timestep."""
    parts = scheduled_blocks(model).values()
    try:
        for part in parts:
            part.always = True
        yield
    finally:
        for part in parts:
            part.always = False


def edges_of(model: nn.Module) -> list[float]:
    """The timesteps at which some block begins to run or ceases to, falling."""
    return sorted({edge for part in scheduled_blocks(model).values() for edge in part.edges}, reverse=True)


def patterns_of(model: nn.Module) -> list[tuple[bool, ...]]:
    """Which of the blocks run, in each of the bins between `edges_of`."""
    edges = edges_of(model)
    if not edges:
        return [()]
    inside = torch.tensor([edges[0] + 1, *((a + b) / 2 for a, b in pairwise(edges)), edges[-1] - 1])
    parts = scheduled_blocks(model).values()
    rows = [[part.runs[number] for number in bins_of(inside, part.edges).tolist()] for part in parts]
    return list(zip(*rows, strict=True))


@contextmanager
def only(model: nn.Module, pattern: Sequence[bool]) -> Iterator[None]:
    """Within it just these blocks run, whatever the timestep."""
    parts = list(scheduled_blocks(model).values())
    try:
        for part, runs in zip(parts, pattern, strict=False):  # one that is the same at all timesteps needs no telling
            part.fixed = runs
        yield
    finally:
        for part in parts:
            part.fixed = None
            part.timestep = None  # it may be one of the exporter's, without values
