"""One DiT-XL/2 block (width 1152, 16 heads) quantized as w4a8 against its float32 export, in ONNX Runtime on the CPU.

    python tools/bench_block.py --rotation none --rotation recipe --rotation full
    python tools/bench_block.py --rotation none --scale token --scale 192 --scale 64

`recipe` rotates as the shipped w4a8 recipe does: inputs online, the input of the attention's output through its values,
which costs nothing here. A block size or `full` rotates every input online. The scale of an input is one a token, one a
tensor, or with a number one for each group of so many channels of a token.

Calls of all variants take turns, so a busy machine slows them alike; what counts is the ratio of the medians.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ditq.export import Engine, float_onnx, prove_fusion, write_engine
from ditq.export.session import open_session, session_options
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.numerics.codebooks import CODEBOOKS
from ditq.numerics.rotation import Rotation, block_hadamard_rotation, hadamard_rotation
from ditq.numerics.weight_code import encode
from ditq.passes.rotate import Rotate
from ditq.passes.rotation_kinds import KINDS, Making
from ditq.recipe import load_recipe

WIDTH, HEADS, HEAD_DIM = 1152, 16, 72
AXES = {"hidden_states": ("batch", None, None), "timestep": ("batch",), "class_labels": ("batch",)}


class Block(nn.Module):
    """A DiT block with its adaLN-Zero modulation, random weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = BasicTransformerBlock(
            WIDTH,
            HEADS,
            HEAD_DIM,
            norm_type="ada_norm_zero",
            num_embeds_ada_norm=1000,
            attention_bias=True,
            activation_fn="gelu-approximate",
            norm_elementwise_affine=False,
        )
        self.eval().requires_grad_(False)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (self.block(hidden_states, timestep=timestep, class_labels=class_labels),)


def quantized(rotation: str, bits: int, codebook: str, activation: ActivationFormat) -> Block:
    """The block with its token linears quantized, rotated online."""
    model = Block()
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not ("attn" in name or "ff" in name):
            continue
        weight, transform = linear.weight, None
        turn = _rotation(rotation, name, linear.in_features)
        if turn is not None:
            weight, transform = turn.right_multiply(weight), InputTransform(rotations=[(0, turn.size, turn)])
        code = encode(weight, CODEBOOKS[codebook](weight, bits))
        scale = torch.tensor(0.05) if activation.granularity == "tensor" else None
        parent, _, leaf = name.rpartition(".")
        layer = QuantLinear(name, code, linear.bias, activation, scale, transform, codebook)
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def _format(scale: str) -> ActivationFormat:
    if scale.isdigit():
        return ActivationFormat(8, "group", group_size=int(scale))
    return ActivationFormat(8, "tensor" if scale == "tensor" else "token")


def _rotation(kind: str, site: str, width: int) -> Rotation | None:
    """The online rotation of a linear's input."""
    if kind == "none":
        return None
    if kind != "recipe":
        return hadamard_rotation(width) if kind == "full" else block_hadamard_rotation(width, int(kind))
    (rotate,) = (step for step in load_recipe("w4a8").passes if isinstance(step, Rotate))
    offline = rotate.values and "to_out" in site
    return None if offline or not rotate.online else KINDS[rotate.mode](torch.empty(0, width), Making(rotate.block))


def _engine(model: Block, folder: Path, inputs: dict[str, Tensor]) -> Engine:
    return write_engine(
        folder,
        model,
        name="block",
        config={},
        class_name="Block",
        family=None,
        fingerprint="",
        recipe={},
        inputs=inputs,
        axes=AXES,
    )


def milliseconds(sessions: dict[str, Any], feed: dict[str, Any], runs: int) -> dict[str, float]:
    """Median time of a call of each session, the sessions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(runs + 1):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feed)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first call warms up


@click.command(help=__doc__)
@click.option(
    "--rotation", multiple=True, default=("none", "recipe", "64", "full"), help="none, recipe, full, block size."
)
@click.option("--bits", default=4, show_default=True, help="Bits of the weights.")
@click.option("--codebook", default="twin_log_shared", show_default=True)
@click.option("--scale", "scales", multiple=True, default=("token",), help="token, tensor, channels of a group.")
@click.option("--batch", default=2, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--runs", default=15, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    rotation: tuple[str, ...],
    bits: int,
    codebook: str,
    scales: tuple[str, ...],
    batch: int,
    tokens: int,
    runs: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(batch, tokens, WIDTH, generator=generator),
        "timestep": torch.linspace(3, 700, batch).long(),
        "class_labels": torch.arange(batch),
    }
    sizes, fused = {}, {"float32": ""}
    sessions = {}
    with TemporaryDirectory(prefix="ditq-bench-") as place:
        graph = float_onnx(Block(), inputs, AXES, Path(place) / "float.onnx")
        sessions["float32"] = open_session(graph, session_options(threads))
        sizes["float32"] = (graph.parent / f"{graph.name}.data").stat().st_size
        for kind, scale in itertools.product(rotation, scales):
            engine = _engine(quantized(kind, bits, codebook, _format(scale)), Path(place) / f"{kind}-{scale}", inputs)
            name = f"w{bits}a8, rotation {kind}, scale {scale}"
            proof = prove_fusion(engine)
            fused[name] = f"{len(proof.fused)}/{proof.planned}"
            sizes[name] = engine.files["weights.safetensors"]["bytes"]
            sessions[name] = open_session(engine.folder / "model.onnx", session_options(threads))
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        found = milliseconds(sessions, feed, runs)
    click.echo(f"{'block ' + str(batch) + 'x' + str(tokens):38} {'ms':>8} {'speed':>7} {'MB':>7}  fused")
    for name, median in found.items():
        speed = f"{found['float32'] / median:.2f}x"
        click.echo(f"{name:38} {median:8.1f} {speed:>7} {sizes[name] / 1e6:7.1f}  {fused[name]}")


if __name__ == "__main__":
    main()
