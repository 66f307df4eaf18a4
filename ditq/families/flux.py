"""FLUX.1: double and single stream blocks, text and image tokens in one attention, pooled text in the modulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import SIDE, Family, Inputs, Sizes, noise, register
from ditq.numerics.token_layout import TokenLayout


def picture_ids(side: int) -> torch.Tensor:
    """(0, row, column) of each token of a square picture: [side^2, 3]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros(side, side), rows.float(), columns.float()], dim=-1).view(-1, 3)


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side, text = config.get(SIDE, 8), 16
    inputs = {
        "hidden_states": normal(batch, side * side, config["in_channels"]),
        "encoder_hidden_states": normal(batch, text, config["joint_attention_dim"]),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_ids": picture_ids(side),
        "txt_ids": torch.zeros(text, 3),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 1, 4), "image_tokens": (16, 4096, 8192), "text_tokens": (1, 512, 512)}


register(
    Family(
        name="flux",
        class_names=("FluxTransformer2DModel",),
        pipeline="FluxPipeline",
        axes={
            "hidden_states": ("batch", "image_tokens", None),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "pooled_projections": ("batch", None),
            "timestep": ("batch",),
            "img_ids": ("image_tokens", None),
            "txt_ids": ("text_tokens", None),
            "guidance": ("batch",),
        },
        example_inputs=example_inputs,
        sizes=sizes,
        layout=lambda config: TokenLayout(positions="img_ids", text="encoder_hidden_states"),
    )
)
