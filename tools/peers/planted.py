"""Planted outliers: a checkpoint that computes the same function, with the outliers of large diffusion transformers.

The small checkpoints have mild activations; large ones have a few channels up to 245 times the rest (LRQ-DiT, section 3.1).
All changes are exact up to rounding in float32:

    input channel j behind a modulation    x'_j = kappa_j x_j + c_j,    W'_j = W_j / kappa_j,    b' = b - W'_j c_j
    value channel j of an attention        W_v[j], b_v[j] times t_j,    W_o[:, j] / t_j

kappa is 5 for mild channels and between 50 and 245 for salient ones, c the constant offsets; t has heavy tails. Feed-forwards
are left as they are: GELU lets no scale through.

    python -m tools.peers.planted mini -o planted-mini
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.parts import InputGroup, LinearModulation, TableModulation
from ditq.passes.folding import fold_into_consumers, fold_into_feed, plain_linear

MILD_SHARE, MILD = 0.05, 5.0  # share of channels, kappa
SALIENT = (50.0, 245.0)  # kappa of two channels, log-uniform between these
OFFSETS = (-90.0, 40.0)  # constants on two more channels
TAILS = 3.0  # degrees of freedom of Student's t; |t|, clamped to TAIL_RANGE, scales a value channel
TAIL_RANGE = (0.05, 20.0)


def plant(graph: DiTGraph, seed: int = 0) -> list[str]:
    """Plant outliers in the graph's model, in place; returns the inputs that got them.

    Inputs behind a modulation that all blocks share (adaLN-single) get the same kappa in all blocks, in the shared linear
    itself. Raises DitqError for a model without any modulated input.
    """
    generator = torch.Generator().manual_seed(seed)
    planted: list[str] = []
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    for group in graph.groups.values():
        if isinstance(group.feed, LinearModulation):
            kappa, offset = _draw(group.width, generator)
            fold_into_feed(graph, group.feed, kappa, -offset)
        elif isinstance(group.feed, TableModulation):
            row = group.feed.scale
            if row not in shared:
                shared[row] = _draw(group.width, generator)
                _scale_shared(graph, group, shared[row][0])
            kappa, offset = shared[row]
            _scale_table(graph, group.feed, kappa, offset)
        else:
            continue
        fold_into_consumers(graph, group.sites, kappa, -offset)
        planted.append(group.name)
    if not planted:
        raise DitqError("no input of this model is made by a modulation; there is nowhere to plant outliers")
    _plant_values(graph, generator)
    return planted


def _draw(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(kappa, c), float64 [width]."""
    kappa, offset = torch.ones(width).double(), torch.zeros(width).double()
    order = torch.randperm(width, generator=generator)
    mild = max(1, round(MILD_SHARE * width))
    kappa[order[:mild]] = MILD
    low, high = torch.tensor(SALIENT).double().log()
    kappa[order[mild : mild + 2]] = (low + (high - low) * torch.rand(2, generator=generator).double()).exp()
    offset[order[mild + 2 : mild + 4]] = torch.tensor(OFFSETS).double()
    return kappa, offset


@torch.no_grad()
def _scale_shared(graph: DiTGraph, group: InputGroup, kappa: Tensor) -> None:
    """Rows of the one modulation linear that all blocks read: scale and shift of this kind times kappa."""
    assert isinstance(group.feed, TableModulation)
    tables = [
        name for name, site in graph.sites.items() if site.role == "modulation" and site.out_features > group.width
    ]
    if len(tables) != 1:
        raise DitqError(f"{group.name}: expected one modulation linear that all blocks share, found {len(tables)}")
    linear = plain_linear(graph, tables[0])
    for row in (group.feed.scale, group.feed.shift):
        piece = slice(row * group.width, (row + 1) * group.width)
        linear.weight[piece] = (linear.weight[piece].double() * kappa[:, None]).float()
        linear.bias[piece] = (linear.bias[piece].double() * kappa).float()


@torch.no_grad()
def _scale_table(graph: DiTGraph, feed: TableModulation, kappa: Tensor, offset: Tensor) -> None:
    """The block's own table: 1 + T' = kappa (1 + T) for the scale, T' = kappa T + c for the shift."""
    table = graph.model.get_parameter(feed.table)
    rows = table.view(-1, table.shape[-1])
    rows[feed.scale] = (kappa * (1 + rows[feed.scale].double()) - 1).float()
    rows[feed.shift] = (kappa * rows[feed.shift].double() + offset).float()


@torch.no_grad()
def _plant_values(graph: DiTGraph, generator: torch.Generator) -> None:
    for attention in graph.attentions.values():
        if not attention.foldable:
            continue
        width = attention.heads * attention.head_width
        normal = torch.randn(1 + int(TAILS), width, generator=generator).double()
        tails = normal[0] / (normal[1:].square().mean(0)).sqrt()  # Student's t
        factor = tails.abs().clamp(*TAIL_RANGE)
        for site in attention.values:
            linear = plain_linear(graph, site)
            linear.weight.copy_((linear.weight.double() * factor[:, None]).float())
            if linear.bias is not None:
                linear.bias.copy_((linear.bias.double() * factor).float())
        for output in attention.outputs:
            columns = plain_linear(graph, output.site).weight[:, output.start : output.stop]
            columns.copy_((columns.double() / factor).float())


def plant_checkpoint(checkpoint: Checkpoint, graph: DiTGraph, folder: Path, seed: int = 0) -> list[str]:
    """Write the checkpoint with planted outliers, in float32, as a pipeline folder; `graph` holds its model.

    Raises DitqError where the checkpoint is no pipeline folder or `folder` exists.
    """
    if checkpoint.pipeline_root is None:
        raise DitqError(f"{checkpoint.name}: give a whole pipeline folder; a transformer alone cannot draw")
    if folder.exists():
        raise DitqError(f"{folder}: exists already; remove it or give another folder")
    found = plant(graph, seed)
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(checkpoint.pipeline_root, beside)
    for old in (beside / "transformer").glob("*.safetensors*"):
        old.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in graph.model.state_dict().items()}
    save_file(tensors, beside / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    beside.rename(folder)
    return found


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The new pipeline folder.")
@click.option("--seed", default=0, show_default=True)
def main(checkpoint: str, output: Path, seed: int) -> None:
    """Write CHECKPOINT with planted outliers: the same function, harder to quantize."""
    opened = Checkpoint.open(checkpoint)
    found = plant_checkpoint(opened, DiTGraph(opened.load_model(), example_inputs(opened)), output, seed)
    click.echo(f"{output}: outliers in {len(found)} inputs")


if __name__ == "__main__":
    main()
