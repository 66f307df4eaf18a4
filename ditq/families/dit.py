"""DiT: class-conditional, each block with its own timestep and label embedder and modulation linear (adaLN-Zero)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import Family, Inputs, Sizes, latent_side, noise, register
from ditq.numerics.token_layout import TokenLayout


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side = latent_side(config, config["sample_size"])
    return {
        "hidden_states": normal(batch, config["in_channels"], side, side),
        # Whole numbers in floating point: the model was trained on these, and Euler's scheduler asks for others.
        "timestep": torch.linspace(200, 900, batch).round(),
        "class_labels": torch.arange(batch) % (config["num_embeds_ada_norm"] or 1),
    }


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 2, 8)}


register(
    Family(
        name="dit",
        class_names=("DiTTransformer2DModel",),
        pipeline="DiTPipeline",
        axes={
            # Height and width stay fixed: the position grid is computed for one size while tracing.
            "hidden_states": ("batch", None, None, None),
            "timestep": ("batch",),
            "class_labels": ("batch",),
        },
        example_inputs=example_inputs,
        sizes=sizes,
        layout=lambda config: TokenLayout(patch=config["patch_size"]),
        condition="class",
    )
)
