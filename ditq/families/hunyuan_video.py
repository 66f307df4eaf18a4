"""HunyuanVideo: FLUX's double and single blocks over a video, the text refined by blocks of its own first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import SIDE, Family, Inputs, Sizes, noise, register


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side, text = config.get(SIDE, 4) * config["patch_size"], 16
    inputs = {
        "hidden_states": normal(batch, config["in_channels"], 2 * config["patch_size_t"], side, side),
        "timestep": torch.linspace(200.0, 900.0, batch),
        "encoder_hidden_states": normal(batch, text, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(batch, text, dtype=torch.int64),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((batch,), 6000.0)
    return inputs


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 1, 2), "text_tokens": (1, 256, 256), "frames": (1, 16, 33), "height": (8, 90, 136),
            "width": (8, 160, 160)}  # fmt: skip


register(
    Family(
        name="hunyuan_video",
        class_names=("HunyuanVideoTransformer3DModel",),
        pipeline="HunyuanVideoPipeline",
        axes={
            "hidden_states": ("batch", None, "frames", "height", "width"),
            "timestep": ("batch",),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "encoder_attention_mask": ("batch", "text_tokens"),
            "pooled_projections": ("batch", None),
            "guidance": ("batch",),
        },
        example_inputs=example_inputs,
        sizes=sizes,
    )
)
