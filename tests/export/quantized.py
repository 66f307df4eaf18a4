"""Quantized layers for the export tests: one of each format, and whole small models of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq.export import Engine, float64_agreement, write_engine
from ditq.families import family_of
from ditq.graph import DiTGraph
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.nn.quant_linear import Branch
from ditq.nn.structural.experts import divided
from ditq.numerics.codebooks import CODEBOOKS
from ditq.numerics.low_rank import fit_low_rank
from ditq.numerics.rotation import Rotation, block_hadamard_rotation, hadamard_rotation
from ditq.numerics.weight_code import encode
from ditq.passes.feed_forwards import isolate
from tests.families_small import small_inputs, small_model


def quantized(
    linear: nn.Linear,
    site: str,
    bits: int = 4,
    activation: ActivationFormat = ActivationFormat(8, "token"),  # noqa: B008  frozen
    codebook: str = "twin_log_shared",
    transform: InputTransform | None = None,
    rank: int = 0,
    branch: Branch = "integer",
    **settings: Any,
) -> QuantLinear:
    """`linear` rounded to the nearest levels. Its weight is taken as being in the transformed basis already."""
    weight = linear.weight.detach()
    low_rank = fit_low_rank(weight, None, rank) if rank else None
    remainder = weight if low_rank is None else weight - low_rank.product()
    code = replace(encode(remainder, CODEBOOKS[codebook](remainder, bits, **settings)), low_rank=low_rank)
    scales = {"tensor": torch.tensor(0.031), "timestep": torch.linspace(0.02, 0.4, len(activation.edges) + 1)}
    scale = scales.get(activation.granularity)
    return QuantLinear(site, code, linear.bias, activation, scale, transform, codebook, branch)


def means_torch(engine: Engine, inputs: dict[str, Any]) -> None:
    """The engine's graphs are the torch meaning with all its roundings, where no last bit decides one: in float64."""
    found = float64_agreement(engine, inputs)
    assert found.holds, str(found)


def shallow_model(family: str, **settings: int) -> nn.Module:
    """One block of each kind, which exports in half the time. SD3 keeps two: its last block is not like the others.

    settings: numbers of blocks, where there shall be others.
    """
    model = small_model(family)
    config = {**model.config, "num_layers": 2 if family == "sd3" else 1}  # type: ignore[dict-item]
    if "num_single_layers" in config:
        config["num_single_layers"] = 1
    builder: Any = type(model)
    shallow = builder.from_config({**config, **settings})
    weights = model.state_dict()
    shallow.load_state_dict({name: weights[name] for name in shallow.state_dict()})
    return shallow.eval().requires_grad_(False)


def rotations(width: int) -> Rotation:
    """The full Hadamard rotation where the width has one, else blocks."""
    try:
        return hadamard_rotation(width)
    except ValueError:
        return block_hadamard_rotation(width)


def quantize_blocks(model: nn.Module, weight_only: bool = False) -> nn.Module:
    """Every linear of the blocks but routers as w4a8, rotated; modulation (all, if so asked) as w4 with float inputs."""
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or "blocks" not in name or name.endswith("router"):
            continue
        parent, _, leaf = name.rpartition(".")
        if weight_only or "norm" in name:
            layer = quantized(linear, name, activation=ActivationFormat())
        else:
            width = linear.in_features
            transform = InputTransform(rotations=[(0, width, rotations(width))])
            layer = quantized(linear, name, transform=transform)
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def with_experts(family: str, choice: str) -> nn.Module:
    """A shallow model whose last feed-forward is 4 experts, quantized."""
    model = shallow_model(family)
    graph = DiTGraph(model, small_inputs(model))
    found = list(graph.feed_forwards.values())[-1]
    place = isolate(graph, found)
    order = torch.randperm(place.form.hidden, generator=torch.Generator().manual_seed(0))
    shared, parts = order[: place.form.hidden // 4], order[place.form.hidden // 4 :].view(4, -1)
    mixture = divided(model.get_submodule(place.module), place.form, shared, parts, top=2, capacity=1.25, choice=choice)
    # With this seed small FLUX's scores have no near ties, of which bfloat16 would decide some otherwise.
    nn.init.normal_(mixture.router.weight, generator=torch.Generator().manual_seed(12))  # type: ignore[arg-type]
    graph.replace(place.module, mixture)
    return quantize_blocks(model)


def engine_of(model: nn.Module, folder: Path, **settings: Any) -> Engine:
    """An engine of a small model of a known family, in which whatever the family says may vary does."""
    family = family_of(type(model).__name__)
    assert family is not None
    engine = write_engine(
        folder,
        model,
        **{
            "name": "small",
            "config": dict(model.config),  # type: ignore[arg-type]
            "class_name": type(model).__name__,
            "family": family.name,
            "fingerprint": "0" * 64,
            "recipe": {},
            "inputs": small_inputs(model),
            "axes": family.axes,
            **settings,
        },
    )
    assert engine.manifest["dropped_axes"] == []
    return engine


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
