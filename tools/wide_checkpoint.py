"""A checkpoint of FLUX's width with few blocks, random weights and the built-in checkpoint's text encoders and VAE.

    python -m tools.wide_checkpoint wide --double 1 --single 2
    ditq compile wide -o engine --limit 2 --steps 4 --evaluate 0

For what a compile takes in memory and time at widths that the built-in checkpoints do not have; its pictures are noise.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import torch
from diffusers import FluxTransformer2DModel

from ditq.checkpoint import Checkpoint


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--double", default=1, show_default=True, help="Blocks with a stream for text and one for the picture.")
@click.option("--single", default=2, show_default=True, help="Blocks of one stream.")
@click.option("--heads", default=24, show_default=True, help="Of 128 channels each; 24 are FLUX.1's.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, double: int, single: int, heads: int, seed: int) -> None:
    if out.exists():
        raise click.UsageError(f"{out} exists; choose another name")
    mini = Checkpoint.open("mini")
    assert mini.pipeline_root is not None
    shutil.copytree(mini.pipeline_root, out, ignore=shutil.ignore_patterns("transformer"))
    config = {**mini.config, "num_layers": double, "num_single_layers": single}
    config |= {"num_attention_heads": heads, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    model = FluxTransformer2DModel.from_config(config)
    model.save_pretrained(out / "transformer", max_shard_size="2GB")
    click.echo(f"{sum(parameter.numel() for parameter in model.parameters()):,d} parameters in {out}")


if __name__ == "__main__":
    main()
