"""Stable Diffusion 3 and 3.5: joint blocks with a modulation linear each, learned position grid cropped to the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import Family, Inputs, noise, register


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side = min(config["sample_size"], 16)
    return {
        "hidden_states": normal(batch, config["in_channels"], side, side),
        "encoder_hidden_states": normal(batch, 24, config["joint_attention_dim"]),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
        "timestep": torch.linspace(200.0, 900.0, batch),
    }


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
    )
)
