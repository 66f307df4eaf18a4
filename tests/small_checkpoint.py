"""A FLUX of two blocks on disk, alone and inside the built-in checkpoint's pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditq.checkpoint import BUILT_IN

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
CONFIG: dict[str, Any] = {
    "in_channels": 32, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 128, "pooled_projection_dim": 128, "axes_dims_rope": (8, 12, 12), "guidance_embeds": False,
}  # fmt: skip
SAMPLING: dict[str, Any] = {
    "height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 1.0, "guidance_scale": 0.0,
    "max_sequence_length": 16,
}  # fmt: skip


def small_flux(seed: int = 0, layers: int = 1) -> nn.Module:
    """So many blocks of each kind. Weights are whole multiples of 1/512 below 1/4, which bfloat16 and float16 hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    model = diffusers.FluxTransformer2DModel(**{**CONFIG, "num_layers": layers, "num_single_layers": layers})
    for parameter in model.parameters():
        parameter.data = torch.randint(-127, 128, parameter.shape, generator=generator) / 512.0
    return model.eval().requires_grad_(False)


def write_transformer(folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False, layers: int = 1) -> Path:
    """A transformer folder: config.json and one safetensors file, or several with an index."""
    small_flux(layers=layers).to(dtype).save_pretrained(folder, max_shard_size="150KB" if shards else "1GB")
    return folder


def write_pipeline(folder: Path, layers: int = 1) -> Path:
    """A pipeline folder: the small transformer among the built-in checkpoint's text encoders, VAE and scheduler."""
    mini = BUILT_IN["mini"]
    for item in mini.iterdir():
        if item.is_dir() and item.name != "transformer":
            shutil.copytree(item, folder / item.name)
    shutil.copy(mini / "model_index.json", folder)
    (folder / "sampling.json").write_text(json.dumps(SAMPLING))
    write_transformer(folder / "transformer", layers=layers)
    return folder


def change_config(folder: Path, **entries: Any) -> None:
    """Set entries of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the single weights file after `change` of its tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file, its data left as they are."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def files_below(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
