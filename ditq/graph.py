"""DiTGraph: a diffusion transformer with typed views of its blocks, linear sites, input groups, attentions, feed-forwards.

The nn.Module stays the executable graph; the views are found by structure (ditq/structure.py), never by class name.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ditq.errors import DitqError
from ditq.families import family_of
from ditq.nn.structural.ordered_tokens import ordered_tokens
from ditq.numerics.token_layout import TokenLayout
from ditq.parts import Attention, Block, FeedForward, InputGroup, LinearSite
from ditq.structure import Structure
from ditq.trace import trace_forward


class DiTGraph:
    """The model plus what was found in it.

    Args:
        model: the transformer, in evaluation mode.
        example_inputs: keyword arguments of one forward; only shapes and dtypes matter.

    Raises:
        DitqError: the model does not run, or no repeated blocks with linears, so ditq cannot compile it.
    """

    def __init__(self, model: nn.Module, example_inputs: Mapping[str, Any]) -> None:
        self.model = model
        self.example_inputs = dict(example_inputs)
        self.refresh()

    def refresh(self) -> None:
        """Find all parts anew, after a structural pass has changed the model; while its linears are linears yet.

        Raises:
            DitqError: as the constructor.
        """
        model, example_inputs = self.model, self.example_inputs
        batch = next(value.shape[0] for value in example_inputs.values() if isinstance(value, torch.Tensor))
        try:
            trace = trace_forward(model, example_inputs)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DitqError(
                f"{type(model).__name__}: does not run with its config and inputs of these shapes: {reason[0]}"
            ) from error
        found = Structure(model, trace, batch)
        self.blocks: dict[str, Block] = found.blocks
        self.sites: dict[str, LinearSite] = found.sites
        self.groups: dict[str, InputGroup] = found.groups
        self.attentions: dict[str, Attention] = found.attentions
        self.feed_forwards: dict[str, FeedForward] = found.feed_forwards
        if not self.blocks:
            raise DitqError(
                f"{type(model).__name__}: no repeated blocks with linears found; not a diffusion transformer?"
            )

    def fix_picture(self, picture: tuple[int, int]) -> None:
        """From now on the example is of a picture of these rows and columns of image tokens: the model is for such only."""
        family = family_of(type(self.model).__name__)
        assert family is not None  # which told the layout
        self.example_inputs = family.inputs_of(self.model.config, 2, 0, picture)  # type: ignore[arg-type]
        self.refresh()

    @property
    def layout(self) -> TokenLayout | None:
        """Where the picture lies among the tokens of attentions, as the model's family tells, in the order that a pass has put
        them in; None where that is not known."""
        if (ordered := ordered_tokens(self.model)) is not None:
            return ordered.layout
        family, config = family_of(type(self.model).__name__), getattr(self.model, "config", None)
        return None if family is None or config is None else family.layout(config)

    def linear(self, name: str) -> nn.Module:
        """The module that stands at a site now: an nn.Linear or what a pass has put in its place."""
        return self.model.get_submodule(name)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in the place of what stands at `name`, in the same mode (training or evaluation)."""
        self.model.set_submodule(name, module.train(self.model.get_submodule(name).training))

    def text_sites(self, changing: Collection[str]) -> list[str]:
        """Linears that compute the same at every step of a trajectory, where keys and values of attention are among them.

        Cross attention to the text has such; joint attention mixes the text with time and image in every block.

        Args:
            changing: arguments of the model's forward that change from step to step.
        """
        steady = {
            site.name for site in self.sites.values() if site.arguments and not set(site.arguments) & set(changing)
        }
        keys_and_values = {site for found in self.attentions.values() for site in (*found.keys, *found.values)}
        return [name for name in self.sites if name in steady] if steady & keys_and_values else []

    def select(self, patterns: str | Iterable[str]) -> list[str]:
        """Names of sites that match any of the patterns, in model order.

        A pattern is a glob over the site's name, or `role:NAME` or `kind:NAME`; `*` is every site that the model uses.

        Raises:
            DitqError: a pattern that matches nothing.
        """
        wanted: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = [site.name for site in self.sites.values() if site.role != "unused" and _matches(site, pattern)]
            if not found:
                raise DitqError(f"the selector {pattern!r} matches no linear of {type(self.model).__name__}; "
                                "see `ditq inspect` for the names, roles and kinds")  # fmt: skip
            wanted.update(found)
        return [name for name in self.sites if name in wanted]


def _matches(site: LinearSite, pattern: str) -> bool:
    key, _, value = pattern.partition(":")
    if value and key == "role":
        return site.role == value
    if value and key == "kind":
        return value in site.kind.split("+")
    return fnmatch.fnmatchcase(site.name, pattern)
