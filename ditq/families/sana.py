"""Sana: linear attention to the picture, softmax attention to the text, convolutions in the place of feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import Family, Inputs, Sizes, latent_side, noise, register


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side, text = latent_side(config, 8), 24
    mask = torch.ones(batch, text, dtype=torch.int64)
    mask[-1, text // 2 :] = 0
    return {
        "hidden_states": normal(batch, config["in_channels"], side, side),
        "encoder_hidden_states": normal(batch, text, config["caption_channels"]),
        "timestep": torch.linspace(200.0, 900.0, batch),
        "encoder_attention_mask": mask,
    }


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 2, 4), "text_tokens": (1, 300, 300), "height": (8, 32, 128), "width": (8, 32, 128)}


register(
    Family(
        name="sana",
        class_names=("SanaTransformer2DModel",),
        pipeline="SanaPipeline",
        axes={
            "hidden_states": ("batch", None, "height", "width"),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "timestep": ("batch",),
            "encoder_attention_mask": ("batch", "text_tokens"),
        },
        example_inputs=example_inputs,
        sizes=sizes,
    )
)
