"""Stable Diffusion 3 and 3.5: joint blocks with a modulation linear each, learned position grid cropped to the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import Family, Inputs, Sizes, latent_side, noise, register
from ditq.numerics.token_layout import TokenLayout


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side = latent_side(config, min(config["sample_size"], 16))
    return {
        "hidden_states": normal(batch, config["in_channels"], side, side),
        "encoder_hidden_states": normal(batch, 24, config["joint_attention_dim"]),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
        "timestep": torch.linspace(200.0, 900.0, batch),
    }


def sizes(config: Mapping[str, Any]) -> Sizes:
    side = config["sample_size"]
    largest = min(2 * side, config["patch_size"] * config["pos_embed_max_size"])  # the learned position grid ends there
    sides = (min(side // 4, largest), min(side, largest), largest)
    return {"batch": (1, 2, 4), "height": sides, "width": sides, "text_tokens": (1, 333, 512)}


register(
    Family(
        name="sd3",
        class_names=("SD3Transformer2DModel",),
        pipeline="StableDiffusion3Pipeline",
        axes={
            "hidden_states": ("batch", None, "height", "width"),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "pooled_projections": ("batch", None),
            "timestep": ("batch",),
        },
        example_inputs=example_inputs,
        sizes=sizes,
        layout=lambda config: TokenLayout(patch=config["patch_size"], text="encoder_hidden_states", text_first=False),
    )
)
