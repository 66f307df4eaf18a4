"""What a low-rank branch adds to the time of one quantized linear in ONNX Runtime on the CPU.

    python -m tools.bench_low_rank --rank 32

Linears of the widths of DiT-XL/2, random weights; calls of all variants take turns, so that a busy machine slows them alike.
"""

from __future__ import annotations

from dataclasses import replace

import click
import onnx_ir as ir
import torch
from torch import nn

from ditq.export.onnx_graph import to_onnx
from ditq.export.session import open_session, session_options
from ditq.export.targets.onnxruntime_cpu import lower
from ditq.nn import ActivationFormat, QuantLinear
from ditq.nn.quant_linear import Branch
from ditq.numerics.codebook import CODEBOOKS, LowRank, encode
from tools.bench_block import milliseconds

SHAPES = ((1152, 4608), (4608, 1152), (1152, 1152))  # inputs, outputs


class One(nn.Module):
    """One linear as a model."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.layer(x),)


def quantized(inputs: int, outputs: int, rank: int, branch: Branch) -> QuantLinear:
    """A w4a8 linear of random weights with a branch of random factors."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(outputs, inputs, generator=generator)
    code = encode(weight, CODEBOOKS["twin_log_shared"](weight, 4, mu=4.0))
    if rank:
        down = torch.randint(-64, 65, (rank, inputs), dtype=torch.int8, generator=generator)
        up = torch.randint(-127, 128, (outputs, rank), dtype=torch.int8, generator=generator)
        code = replace(code, low_rank=LowRank(down, up, torch.full((rank,), 1e-6)))
    bias = torch.randn(outputs, generator=generator)
    return QuantLinear("layer", code, bias, ActivationFormat(8, "token"), branch=branch)


@click.command(help=__doc__)
@click.option("--rank", default=32, show_default=True)
@click.option("--tokens", default=512, show_default=True)
@click.option("--runs", default=15, show_default=True)
def main(rank: int, tokens: int, runs: int) -> None:
    torch.set_num_threads(1)
    click.echo(f"{'inputs x outputs':18} {'branch':9} {'ms':>7} {'added':>7} {'torch - ONNX':>13}")
    for inputs, outputs in SHAPES:
        layers: dict[str, QuantLinear] = {"none": quantized(inputs, outputs, 0, "integer")}
        for branch in ("integer", "float"):
            layers[branch] = quantized(inputs, outputs, rank, branch)  # type: ignore[arg-type]
        sessions, x = {}, torch.randn(1, tokens, inputs, generator=torch.Generator().manual_seed(1))
        for name, layer in layers.items():
            graph = to_onnx(One(layer).eval(), {"x": x}, {})
            lower(graph, {"layer": layer})
            sessions[name] = open_session(ir.to_proto(graph).SerializeToString(), session_options(1))
        found = milliseconds(sessions, {"x": x.numpy()}, runs)
        for name, layer in layers.items():
            expected = layer(x)
            difference = torch.from_numpy(sessions[name].run(None, {"x": x.numpy()})[0]) - expected
            share = float(difference.norm() / expected.norm())
            added = f"{100 * (found[name] / found['none'] - 1):+.1f}%"
            click.echo(f"{f'{inputs} x {outputs}':18} {name:9} {found[name]:7.2f} {added:>7} {share:13.0e}")


if __name__ == "__main__":
    main()
