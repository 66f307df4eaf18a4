"""Real diffusers pipelines small enough for tests: the built-in checkpoint, random transformers of other families."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ditq.checkpoint import Checkpoint

torch.set_num_threads(1)

STEPS = 2
ARGUMENTS: dict[str, dict[str, Any]] = {
    "flux": {
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "true_cfg_scale": 3.0,
        "guidance_scale": 0.0,
        "negative_prompt": "",
        "max_sequence_length": 16,
    },
    "pixart": {
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 16,
    },
    "sd3": {"height": 32, "width": 32, "num_inference_steps": STEPS, "max_sequence_length": 16},
    "dit": {"num_inference_steps": STEPS},
}
CONDITIONS: dict[str, list[Any]] = {
    "flux": ["red apple, fluent 3d", "dog, noto"],
    "pixart": ["red apple, fluent 3d", "dog, noto"],
    "sd3": ["red apple, fluent 3d", "dog, noto"],
    "dit": [7, 3],
}
FAMILIES = tuple(ARGUMENTS)


@functools.cache
def mini() -> Checkpoint:
    return Checkpoint.open("mini")


@functools.cache
def pipeline_of(family: str) -> Any:
    """One pipeline a family and process; tests leave it as they found it."""
    flux = mini().load_pipeline() if family == "flux" else pipeline_of("flux")
    if family == "flux":
        return flux
    torch.manual_seed(0)
    make = {"pixart": _pixart, "dit": _dit, "sd3": _sd3}[family]
    pipeline = make(flux)
    pipeline.transformer.eval().requires_grad_(False)
    return pipeline


def _pixart(flux: Any) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=16,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=128,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=flux.tokenizer_2,
        text_encoder=flux.text_encoder_2,
        vae=flux.vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _dit(flux: Any) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=16,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    # draws noise in every step, and the pipeline hands it no generator
    return diffusers.DiTPipeline(transformer=transformer, vae=flux.vae, scheduler=diffusers.DDPMScheduler())


def _sd3(flux: Any) -> Any:
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=1500,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=32,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ).eval()
        for _ in range(2)
    ]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flux.vae,
        text_encoder=encoders[0],
        tokenizer=flux.tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=flux.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def saved_checkpoint(family: str, folder: Path) -> Checkpoint:
    """The pipeline as a pipeline folder on disk."""
    if family == "flux":
        return mini()
    pipeline_of(family).save_pretrained(folder, safe_serialization=True)
    return Checkpoint.open(folder)
