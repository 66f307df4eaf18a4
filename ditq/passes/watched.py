"""A model whose forward also gives what is inside it: outputs of modules by name, their arguments, what its parts ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ditq.nn.structural import StructuralPart
from ditq.passes.block_records import Call, tensors_of

Seen = tuple[list[Tensor], list[list[Tensor]], Tensor]
"""The answers; the outputs of each watched module; the sum of what parts ask for."""


class Watched(nn.Module):
    """`model` with the modules `names` watched.

    Everything that a loss may be made of is among what forward returns, so that wrappers of data-parallel training see it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.given: list[Call] = []
        """What each watched module got in the last forward."""

    def forward(self, arguments: Mapping[str, Any], instead: Sequence[Call] | None = None) -> Seen:
        """One call of the model. instead: what the watched modules get, in place of what comes to them."""
        outputs: dict[int, list[Tensor]] = {}
        self.given = [((), {})] * len(self.names)

        def before(place: int) -> Any:
            def hook(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Call | None:
                self.given[place] = (positional, keywords)
                return None if instead is None else instead[place]

            return hook

        def after(place: int) -> Any:
            return lambda module, positional, output: outputs.__setitem__(place, tensors_of(output))

        with ExitStack() as stack:
            for place, name in enumerate(self.names):
                module = self.model.get_submodule(name)
                handle = module.register_forward_pre_hook(before(place), with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(after(place)).remove)
            answer = tensors_of(self.model(**{**arguments, "return_dict": False}))
        return answer, [outputs[place] for place in range(len(self.names))], self._asked(answer[0])

    def _asked(self, like: Tensor) -> Tensor:
        parts = [part for part in self.model.modules() if isinstance(part, StructuralPart) and part.training]
        asked = [found for part in parts if (found := part.auxiliary_loss()) is not None]
        return torch.stack([value.float() for value in asked]).sum() if asked else like.new_zeros((), dtype=torch.float)


def parts_of(model: nn.Module) -> dict[str, StructuralPart]:
    """All parts of a model by place, outer ones first."""
    return {name: part for name, part in model.named_modules() if isinstance(part, StructuralPart)}


def fitted_alone(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """The modules that parts are fitted in, each alone, and the distance by which (l1 or l2).

    A part that stands where the original has a module is fitted in its place; else the module around it that both have and that
    gets the same.
    """
    names = {name for name, _ in teacher.named_modules()}
    found: dict[str, str] = {}
    for place, part in parts_of(student).items():
        if part.fitted_by is None:
            continue
        unit = place
        while unit and not (unit in names and _gets_the_same(student.get_submodule(unit))):
            unit = unit.rpartition(".")[0]
        found[unit] = part.fitted_by if found.get(unit) != "l1" else "l1"
    outer = [unit for unit in found if not any(unit != other and _inside(unit, other) for other in found)]
    return {
        unit: "l1" if any(by == "l1" and _inside(name, unit) for name, by in found.items()) else "l2" for unit in outer
    }


def _gets_the_same(module: nn.Module) -> bool:
    return module.same_input if isinstance(module, StructuralPart) else True


def _inside(unit: str, other: str) -> bool:
    return not other or f"{unit}.".startswith(f"{other}.")
