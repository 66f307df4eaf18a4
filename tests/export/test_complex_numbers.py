"""Models that turn queries and keys by complex numbers are exported in pairs of reals."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import nn

from ditq.export import model_agreement, write_engine
from ditq.export.fusion import prove_fusion
from tests.export.quantized import quantize_blocks


def test_an_engine_of_qwen_image_runs_low_bit_and_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
    model.eval().requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(2, 48, 16),
        "encoder_hidden_states": torch.randn(2, 12, 24),
        "encoder_hidden_states_mask": torch.ones(2, 12, dtype=torch.int64),
        "timestep": torch.tensor([0.2, 0.9]),
        "img_shapes": [[(1, 6, 8)]] * 2,
    }
    quantize_blocks(model)
    axes = {"hidden_states": ("batch", None, None), "encoder_hidden_states": ("batch", "text_tokens", None)}
    axes |= {"encoder_hidden_states_mask": ("batch", "text_tokens"), "timestep": ("batch",)}
    engine = write_engine(
        tmp_path / "engine", model, name="small", config=dict(model.config), class_name=type(model).__name__, family=None,
        fingerprint="0" * 64, recipe={}, inputs=inputs, axes=axes,
    )  # fmt: skip
    assert engine.manifest["dropped_axes"] == ["text_tokens"]  # whose length its forward turns into a number
    assert prove_fusion(engine).complete and model_agreement(engine, inputs).holds
