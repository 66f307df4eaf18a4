"""python -m tools.measure_classes: what of ditq holds for transformers that no family describes, on small random models.

For each class: linears found by role, the groups whose smoothing folds into a norm or modulation, how exact the folds are, and
whether an engine of it runs its planned integer products and means what torch does; or why not.
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export import model_agreement, write_engine
from ditq.export.fusion import prove_fusion
from ditq.graph import DiTGraph
from ditq.pass_pipeline import run_passes
from ditq.recipe import Recipe
from tests.families_small import forward, statistics_of

FOLDS = [{"smooth": {"alpha": 0.5, "centre": True}}, {"rotate": {"mode": "block_hadamard", "block": 32}}]
ROUND = {"quantize": {"format": "w4a8", "codebook": "uniform", "rounding": "nearest", "weighted": False}}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
TIMES, STEPS = torch.tensor([0.2, 0.9]), torch.tensor([200.0, 900.0])
TEXT, MASK = torch.randn(2, 12, 24), torch.ones(2, 12, dtype=torch.int64)
PICTURE, PACKED = torch.randn(2, 4, 8, 8), torch.randn(2, 64, 8)


def positions(columns: int = 3) -> Tensor:
    found = torch.zeros(64, columns)
    found[:, 1], found[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    return found


CLASSES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {  # configuration, arguments of the forward
    "QwenImageTransformer2DModel": (
        {**HEADS, "in_channels": 8, "out_channels": 2, "num_layers": 2, "joint_attention_dim": 24,
         "axes_dims_rope": (8, 12, 12)},
        {"hidden_states": PACKED, "encoder_hidden_states": TEXT, "encoder_hidden_states_mask": MASK, "timestep": TIMES,
         "img_shapes": [[(1, 8, 8)]] * 2},
    ),
    "LTXVideoTransformer3DModel": (
        {**HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "num_layers": 2, "caption_channels": 24},
        {"hidden_states": PACKED, "encoder_hidden_states": TEXT, "timestep": STEPS, "encoder_attention_mask": MASK,
         "num_frames": 4, "height": 4, "width": 4, "rope_interpolation_scale": (0.3, 32, 32)},
    ),
    "CogVideoXTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32, "text_embed_dim": 24, "num_layers": 2,
         "sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 12,
         "use_rotary_positional_embeddings": True},
        {"hidden_states": torch.randn(2, 3, 4, 8, 8), "encoder_hidden_states": TEXT, "timestep": STEPS.long(),
         "image_rotary_emb": (torch.randn(48, 32), torch.randn(48, 32))},
    ),
    "CogView4Transformer2DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 24, "time_embed_dim": 32,
         "condition_dim": 16, "pos_embed_max_size": 16, "sample_size": 8, "rope_axes_dim": (16, 16)},
        {"hidden_states": PICTURE, "encoder_hidden_states": torch.randn(2, 16, 24), "timestep": STEPS,
         "original_size": torch.full((2, 2), 64.0), "target_size": torch.full((2, 2), 64.0), "crop_coords": torch.zeros(2, 2)},
    ),
    "AuraFlowTransformer2DModel": (
        {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
         "joint_attention_dim": 24, "caption_projection_dim": 64, "pos_embed_max_size": 64},
        {"hidden_states": PICTURE, "encoder_hidden_states": TEXT, "timestep": TIMES},
    ),
    "HunyuanImageTransformer2DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1,
         "text_embed_dim": 24, "rope_axes_dim": (16, 16)},
        {"hidden_states": PICTURE, "timestep": STEPS, "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK},
    ),
    "HunyuanVideo15Transformer3DModel": (
        {**HEADS, "in_channels": 9, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 24,
         "text_embed_2_dim": 20, "image_embed_dim": 12, "rope_axes_dim": (8, 12, 12), "target_size": 16, "task_type": "t2v"},
        {"hidden_states": torch.randn(2, 9, 2, 4, 4), "timestep": STEPS, "encoder_hidden_states": TEXT,
         "encoder_attention_mask": MASK, "encoder_hidden_states_2": torch.randn(2, 8, 20),
         "encoder_attention_mask_2": MASK[:, :8], "image_embeds": torch.zeros(2, 4, 12)},
    ),
    "Krea2Transformer2DModel": (
        {**HEADS, "in_channels": 8, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 128,
         "timestep_embed_dim": 32, "text_hidden_dim": 24, "num_text_layers": 2, "text_num_attention_heads": 2,
         "text_num_key_value_heads": 2, "text_intermediate_size": 64, "num_layerwise_text_blocks": 1,
         "num_refiner_text_blocks": 1, "axes_dims_rope": (8, 12, 12)},
        {"hidden_states": PACKED, "encoder_hidden_states": torch.randn(2, 12, 2, 24), "timestep": TIMES,
         "position_ids": torch.cat([torch.zeros(12, 3), positions()])},
    ),
    "OvisImageTransformer2DModel": (
        {**HEADS, "in_channels": 8, "out_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
         "axes_dims_rope": (8, 12, 12)},
        {"hidden_states": PACKED, "encoder_hidden_states": TEXT, "timestep": TIMES, "img_ids": positions(),
         "txt_ids": torch.zeros(12, 3)},
    ),
    "LongCatImageTransformer2DModel": (
        {**HEADS, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
         "pooled_projection_dim": 24, "axes_dims_rope": [8, 12, 12]},
        {"hidden_states": PACKED, "encoder_hidden_states": TEXT, "timestep": TIMES, "img_ids": positions(),
         "txt_ids": torch.zeros(12, 3)},
    ),
    "Flux3Transformer2DModel": (
        {**HEADS, "in_channels": 8, "cond_in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24,
         "timestep_channels": 32, "axes_dims_rope": (8, 8, 8, 8)},
        {"hidden_states": PACKED, "encoder_hidden_states": TEXT, "timestep": TIMES, "img_ids": positions(4),
         "txt_ids": torch.zeros(12, 4)},
    ),
    "ErnieImageTransformer2DModel": (
        {"num_attention_heads": 2, "hidden_size": 64, "num_layers": 2, "ffn_hidden_size": 128, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 24, "rope_axes_dim": (8, 12, 12)},
        {"hidden_states": PICTURE, "timestep": STEPS, "text_bth": TEXT, "text_lens": torch.tensor([12, 12])},
    ),
    "PRXTransformer2DModel": (
        {"in_channels": 4, "context_in_dim": 24, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
         "axes_dim": [16, 16]},
        {"hidden_states": PICTURE, "timestep": TIMES, "encoder_hidden_states": TEXT},
    ),
    "MochiTransformer3DModel": (
        {**HEADS, "num_attention_heads": 3, "num_layers": 2, "pooled_projection_dim": 32, "in_channels": 4,
         "text_embed_dim": 24, "time_embed_dim": 32, "max_sequence_length": 12},
        {"hidden_states": torch.randn(2, 4, 2, 8, 8), "encoder_hidden_states": TEXT, "timestep": STEPS,
         "encoder_attention_mask": MASK.bool()},
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 12, 12),
         "axes_lens": (32, 16, 16), "cap_feat_dim": 24},
        {"hidden_states": PICTURE, "timestep": TIMES, "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK},
    ),
    "Kandinsky5Transformer3DModel": (
        {"in_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 20, "time_dim": 32, "out_visual_dim": 4, "model_dim": 64,
         "ff_dim": 128, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12)},
        {"hidden_states": torch.randn(1, 2, 8, 8, 4), "encoder_hidden_states": TEXT[:1], "timestep": STEPS[:1],
         "pooled_projections": torch.randn(1, 20), "text_rope_pos": torch.arange(12),
         "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4))},
    ),
}  # fmt: skip


def small_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
    return model  # type: ignore[no-any-return]


def measured(name: str) -> list[str]:
    """A row of the table."""
    config, inputs = CLASSES[name]
    graph = DiTGraph(small_model(name, config), inputs)
    roles = Counter(site.role for site in graph.sites.values())
    folded = sum(group.feed is not None for group in graph.groups.values())
    before, statistics = forward(graph.model, dict(inputs)), statistics_of(graph, inputs=[dict(inputs)])
    row = [name, str(roles["token"]), str(roles["modulation"]), f"{folded} of {len(graph.groups)}"]
    try:
        run_passes(graph, Recipe.from_dict({"passes": FOLDS}, "folds"), statistics)
        row.append(f"{float((forward(graph.model, dict(inputs)) - before).norm() / before.norm()):.0e}")
        graph = DiTGraph(small_model(name, config), inputs)
        run_passes(graph, Recipe.from_dict({"passes": [*FOLDS, ROUND]}, "w4a8"), statistics)
        row.append(engine_row(graph.model, name, inputs))
    except DitqError as error:
        row.append(str(error).split(": ", 1)[-1][:90])
    return row


def engine_row(model: nn.Module, name: str, inputs: Mapping[str, Any]) -> str:
    """What an engine with any number of samples does."""
    size = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
    samples = {name for name, value in inputs.items() if isinstance(value, Tensor) and len(value) == size > 1}
    axes = {name: ("batch",) for name in samples}
    with tempfile.TemporaryDirectory() as folder:
        engine = write_engine(
            Path(folder) / "engine", model, name=name, config=dict(model.config), class_name=name, family=None,  # type: ignore[arg-type]
            fingerprint="0" * 64, recipe={}, inputs=inputs, axes=axes,
        )  # fmt: skip
        proof, agreement = prove_fusion(engine), model_agreement(engine, inputs)
    fixed = "".join(f"; {axis} fixed" for axis in engine.manifest["dropped_axes"])
    return f"{proof.counted.split(' planned')[0]} fused, torch - ONNX {agreement.error:.0e}{fixed}"


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Print the table, of all classes or of those named."""
    warnings.simplefilter("ignore")
    click.echo("| class | token linears | modulation | folds into a norm or modulation | folds | engine |")
    click.echo("|---|---|---|---|---|---|")
    for name in names or CLASSES:
        click.echo(f"| {' | '.join(measured(name))} |")


if __name__ == "__main__":
    main()
