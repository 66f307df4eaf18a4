"""PixArt alpha and Sigma: cross attention to text, one shared modulation with a table a block (adaLN-single)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ditq.families import Family, Inputs, Sizes, latent_side, noise, register
from ditq.numerics.token_layout import TokenLayout


def example_inputs(config: Mapping[str, Any], batch: int, seed: int) -> Inputs:
    normal = noise(seed)
    side, text = latent_side(config, config["sample_size"]), 24
    mask = torch.ones(batch, text, dtype=torch.int64)
    mask[-1, text // 2 :] = 0
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    additional = config.get("use_additional_conditions")
    if additional is None:  # the class decides by the size then: of alpha's checkpoints that of 1024 pixels has them
        additional = config["sample_size"] == 128
    if additional:
        conditions = {"resolution": torch.full((batch, 2), 1024.0), "aspect_ratio": torch.ones(batch, 1)}
    return {
        "hidden_states": normal(batch, config["in_channels"], side, side),
        "encoder_hidden_states": normal(batch, text, config["caption_channels"] or config["cross_attention_dim"]),
        "timestep": torch.linspace(200.0, 900.0, batch),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": conditions,
    }


def sizes(config: Mapping[str, Any]) -> Sizes:
    return {"batch": (1, 2, 4), "text_tokens": (1, 300, 512)}


register(
    Family(
        name="pixart",
        class_names=("PixArtTransformer2DModel",),
        pipeline="PixArtSigmaPipeline",
        axes={
            # Height and width stay fixed: the position grid is computed for one size while tracing.
            "hidden_states": ("batch", None, None, None),
            "encoder_hidden_states": ("batch", "text_tokens", None),
            "timestep": ("batch",),
            "encoder_attention_mask": ("batch", "text_tokens"),
            "added_cond_kwargs.resolution": ("batch", None),
            "added_cond_kwargs.aspect_ratio": ("batch", None),
        },
        example_inputs=example_inputs,
        sizes=sizes,
        layout=lambda config: TokenLayout(patch=config["patch_size"]),
    )
)
