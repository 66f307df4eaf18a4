"""Wan 2.1 and 2.2, text to video: cross attention to text, one shared modulation with a table a block, a grid in time too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import SIDE, Family, Inputs, Sizes, noise, register
from ditq.numerics.token_layout import TokenLayout


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    _, height, width = config["patch_size"]
    side = config.get(SIDE, 4)
    inputs = {
        "hidden_states": normal(batch, config["in_channels"], 3 * config["patch_size"][0], side * height, side * width),
        "timestep": torch.linspace(200.0, 900.0, batch),
        "encoder_hidden_states": normal(batch, 24, config["text_dim"]),
    }
    if config.get("image_dim") is not None:  # image to video
        inputs["encoder_hidden_states_image"] = normal(batch, 257, config["image_dim"])
    return inputs


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 1, 2), "text_tokens": (1, 512, 512), "frames": (1, 21, 21), "height": (8, 60, 90),
            "width": (8, 104, 160)}  # fmt: skip


def layout(config: Mapping[str, Any]) -> TokenLayout | None:
    frames, height, width = config["patch_size"]
    return TokenLayout(patch=height, frames=frames, rotary="rope") if height == width else None


register(
    Family(
        name="wan",
        class_names=("WanTransformer3DModel",),
        pipeline="WanPipeline",
        axes={
            "hidden_states": ("batch", None, "frames", "height", "width"),
            "timestep": ("batch",),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "encoder_hidden_states_image": ("batch", None, None),
        },
        example_inputs=example_inputs,
        sizes=sizes,
        layout=layout,
    )
)
