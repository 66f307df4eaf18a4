"""Model families: what structure alone cannot tell about a transformer. One short file a family; nothing else lists them.

A family gives example inputs (to trace the graph without a pipeline) and names the dimensions that may vary at run time.
A transformer of no family can still be calibrated by its pipeline, whose calls show its inputs; compiling needs the file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ditq.numerics.token_layout import TokenLayout

Axes = Mapping[str, tuple[str | None, ...]]
Inputs = dict[str, Any]
Sizes = dict[str, tuple[int, int, int]]
SIDE = "image_tokens_a_side"  # in the config for example inputs, where a picture of another size than the usual is asked for
CHANGING = ("hidden_states", "timestep")  # diffusers' names for the noisy sample and the time


@dataclass(frozen=True)
class Family:
    """What ditq knows of one model family.

    Attributes:
        name: short name, e.g. `flux`.
        class_names: diffusers transformer classes of this family.
        pipeline: the diffusers pipeline class that samples with it.
        condition: what a sample is asked for by, a text prompt or a class label.
        axes: forward argument -> one name a dimension; named dimensions may vary in an engine, None is fixed.
        example_inputs: (config, batch, seed) -> keyword arguments of the transformer's forward, real shapes, random values.
        sizes: (config) -> of each axis the smallest, usual and largest size, which engines are built for where a runtime wants
            to know.
        layout: (config) -> where the picture lies among the tokens of an attention, None where that is not known.
        changing: arguments of the forward that change from step to step; the others stay the same for a prompt.
    """

    name: str
    class_names: tuple[str, ...]
    pipeline: str
    axes: Axes
    example_inputs: Callable[[Mapping[str, Any], int, int], Inputs]
    sizes: Callable[[Mapping[str, Any]], Sizes] = lambda config: {}
    layout: Callable[[Mapping[str, Any]], TokenLayout | None] = lambda config: None
    condition: Literal["prompt", "class"] = "prompt"
    changing: tuple[str, ...] = CHANGING

    def inputs_of(
        self, config: Mapping[str, Any], batch: int, seed: int, picture: tuple[int, int] | None = None
    ) -> Inputs:
        """`example_inputs`; of a picture of so many rows and columns of image tokens, if one is given."""
        layout = self.layout(config)
        if picture is None or layout is None:
            return self.example_inputs(config, batch, seed)
        return layout.cut(self.example_inputs({**config, SIDE: max(picture)}, batch, seed), *picture)


_families: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Called once by each family's file."""
    _families[family.name] = family
    return family


def families() -> dict[str, Family]:
    """All families by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_families.items()))


def family_of(class_name: str) -> Family | None:
    """The family of a diffusers transformer class, or None where ditq has no file for it."""
    return next((family for family in families().values() if class_name in family.class_names), None)


def latent_side(config: Mapping[str, Any], usual: int) -> int:
    """Height and width of example latents that are cut into patches."""
    return int(config[SIDE] * config["patch_size"]) if SIDE in config else usual


def noise(seed: int) -> Callable[..., torch.Tensor]:
    """A source of standard normal tensors, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)
