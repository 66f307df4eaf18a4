"""FLUX.2: double and single blocks that share three modulation linears among all of them; gated feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import SIDE, Family, Inputs, Sizes, noise, register


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side, text = config.get(SIDE, 8), 16
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    nothing = torch.zeros(side, side)
    picture = torch.stack([nothing, rows.float(), columns.float(), nothing], dim=-1).view(-1, 4)
    words = torch.cat([torch.zeros(text, 3), torch.arange(text).float()[:, None]], dim=-1)
    inputs = {
        "hidden_states": normal(batch, side * side, config["in_channels"]),
        "encoder_hidden_states": normal(batch, text, config["joint_attention_dim"]),
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_ids": picture.expand(batch, -1, -1).contiguous(),
        "txt_ids": words.expand(batch, -1, -1).contiguous(),
    }
    if config.get("guidance_embeds", True):
        inputs["guidance"] = torch.full((batch,), 4.0)
    return inputs


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 1, 4), "image_tokens": (16, 4096, 8192), "text_tokens": (1, 512, 512)}


register(
    Family(
        name="flux2",
        class_names=("Flux2Transformer2DModel",),
        pipeline="Flux2Pipeline",
        axes={
            "hidden_states": ("batch", "image_tokens", None),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "timestep": ("batch",),
            "img_ids": ("batch", "image_tokens", None),
            "txt_ids": ("batch", "text_tokens", None),
            "guidance": ("batch",),
        },
        example_inputs=example_inputs,
        sizes=sizes,
    )
)
