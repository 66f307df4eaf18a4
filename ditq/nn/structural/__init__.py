"""Parts that change what a model computes, not only how: experts, windows, linear attention. One file a part.

A part is put into a model by a structural pass, described in the engine by its spec, and put into a fresh model again when
the engine is loaded. Each file here registers its own; nothing else lists them.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn


class StructuralPart(nn.Module, ABC):
    """What a structural pass puts into a model at a module's place."""

    kind: ClassVar[str]
    fitted_by: ClassVar[Literal["l1", "l2"] | None] = "l2"
    """The distance by which it is fitted alone to what stood there: l2 for feed-forwards, l1 for attentions, as in Grafting
    (Chandrasegaran et al., arXiv 2506.05340). None: there is nothing to fit alone."""
    same_input: ClassVar[bool] = True
    """Does it get what the module in its place got in the original model?"""
    compared: bool = True
    """Where it is a block: shall it give what the original's block in its place gives?"""

    first: ClassVar[bool] = False
    """Is it put in before others, which stand where it makes room for them?"""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """As JSON, all that `install` needs; without the weights, which are in the model's state dict."""

    @classmethod
    @abstractmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        """Put a part of this spec into `model` at the module path `place`; its weights are loaded afterwards."""

    def alike(self) -> list[list[str]]:
        """Linears in it, by their names from it on, whose inputs are to be transformed alike, so that one kernel can make them
        all: those at one place in all experts.
        """
        return []

    def auxiliary_loss(self) -> Tensor | None:
        """What its last forward in training mode asks for besides the model's answer, such as a balanced load: a scalar with
        a gradient, 0 where all is well, given once. None where it asks for nothing.
        """
        return None


_kinds: dict[str, type[StructuralPart]] = {}
PartClass = TypeVar("PartClass", bound=type[StructuralPart])


def register(part: PartClass) -> PartClass:
    """Decorator of a part's class; makes it known under its `kind`."""
    _kinds[part.kind] = part
    return part


def structural_parts() -> dict[str, type[StructuralPart]]:
    """All kinds of parts by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_kinds.items()))


def describe_parts(model: nn.Module) -> list[dict[str, Any]]:
    """Where `model` has which parts, outer ones first."""
    return [
        {"kind": part.kind, "place": name, "spec": part.spec()}
        for name, part in model.named_modules()
        if isinstance(part, StructuralPart)
    ]


def install_parts(model: nn.Module, described: list[dict[str, Any]]) -> None:
    """Put what `describe_parts` found into a fresh model.

    Raises:
        ValueError: a part of a kind that is not known here.
        AttributeError, KeyError, TypeError, ValueError: a part that does not fit the model at its place.
    """
    known = structural_parts()
    if unknown := next((entry["kind"] for entry in described if entry["kind"] not in known), None):
        raise ValueError(f"parts of kind {unknown!r} are not known here, only {', '.join(known)}")
    for entry in sorted(described, key=lambda entry: not known[entry["kind"]].first):
        known[entry["kind"]].install(model, entry["place"], entry["spec"])
