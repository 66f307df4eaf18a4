"""Chroma: FLUX's blocks without modulation linears; one small network makes the modulation of all blocks from the time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import SIDE, Family, Inputs, Sizes, noise, register
from ditq.families.flux import picture_ids
from ditq.numerics.token_layout import TokenLayout


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side, text = config.get(SIDE, 8), 16
    return {
        "hidden_states": normal(batch, side * side, config["in_channels"]),
        "encoder_hidden_states": normal(batch, text, config["joint_attention_dim"]),
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_ids": picture_ids(side),
        "txt_ids": torch.zeros(text, 3),
        "attention_mask": torch.ones(batch, text + side * side, dtype=torch.bool),
    }


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 1, 4), "image_tokens": (16, 4096, 8192), "text_tokens": (1, 512, 512)}


register(
    Family(
        name="chroma",
        class_names=("ChromaTransformer2DModel",),
        pipeline="ChromaPipeline",
        axes={
            "hidden_states": ("batch", "image_tokens", None),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "timestep": ("batch",),
            "img_ids": ("image_tokens", None),
            "txt_ids": ("text_tokens", None),
            "attention_mask": ("batch", "tokens"),
        },
        example_inputs=example_inputs,
        sizes=sizes,
        layout=lambda config: TokenLayout(positions="img_ids", text="encoder_hidden_states"),
    )
)
