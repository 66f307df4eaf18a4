"""The feed-forward of a DiT-XL/2 block (width 1152, 4608 hidden channels) as experts against the dense one, both W8A8, in ONNX
Runtime on the CPU.

    python -m tools.bench_experts --top 3 --top 1

A ninth of the channels is for all tokens, eight experts have a ninth each: with `--top 3` 4 of 9 parts are active for a token,
with `--top 1` 2 of 9. Calls of all variants take turns; what counts is the ratio of the medians.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ditq.export import Engine, float_onnx, prove_fusion, write_engine
from ditq.export.session import open_session, session_options
from ditq.latency import coded
from ditq.nn.sliced import FeedForwardForm
from ditq.nn.structural.experts import divided
from tools.bench_block import milliseconds

WIDTH, HIDDEN, EXPERTS = 1152, 4608, 8
PART = HIDDEN // (EXPERTS + 1)
FORM = FeedForwardForm(("net.0.proj",), "net.2", HIDDEN)
AXES = {"hidden_states": ("batch", None, None)}


class Layer(nn.Module):
    """A feed-forward with random weights; with `top`, as experts."""

    def __init__(self, top: int = 0, capacity: float = 1.25, choice: str = "token") -> None:
        super().__init__()
        torch.manual_seed(0)
        dense = FeedForward(WIDTH, mult=4, activation_fn="gelu-approximate").eval().requires_grad_(False)
        self.ff: nn.Module = dense
        if top:
            channels = torch.arange(HIDDEN)
            parts = channels[PART:].view(EXPERTS, PART)
            mixture = divided(dense, FORM, channels[:PART], parts, top=top, capacity=capacity, choice=choice)
            nn.init.normal_(mixture.router.weight)  # type: ignore[arg-type]
            self.ff = mixture
        self.eval()

    def forward(self, hidden_states: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.ff(hidden_states),)


def engine_of(layer: nn.Module, folder: Path, inputs: dict[str, Any]) -> Engine:
    return write_engine(
        folder, layer, name="layer", config={}, class_name="Layer", family=None, fingerprint="", recipe={},
        inputs=inputs, axes=AXES,
    )  # fmt: skip


@click.command(help=__doc__)
@click.option("--top", "tops", multiple=True, default=(3, 1), help="Routed experts of a token.")
@click.option("--bits", default=8, show_default=True, help="Bits of the weights of experts and dense layer.")
@click.option("--capacity", default=1.25, show_default=True)
@click.option("--choice", default="token", show_default=True, type=click.Choice(["token", "expert"]))
@click.option("--batch", default=2, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--runs", default=25, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    *, tops: tuple[int, ...], bits: int, capacity: float, choice: str, batch: int, tokens: int, runs: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    inputs = {"hidden_states": torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(0))}
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    dense = f"dense w{bits}a8"
    made = {dense: Layer()} | {f"{1 + top} of {EXPERTS + 1} active": Layer(top, capacity, choice) for top in tops}
    sessions, fused = {}, {"dense float32": ""}
    with TemporaryDirectory(prefix="ditq-bench-") as place:
        graph = float_onnx(Layer(), inputs, AXES, Path(place) / "float.onnx")
        sessions["dense float32"] = open_session(graph, session_options(threads))
        for name, layer in made.items():
            engine = engine_of(coded(layer, bits), Path(place) / name.replace(" ", "-"), inputs)
            proof = prove_fusion(engine)
            fused[name] = f"{len(proof.fused)}/{proof.planned}"
            sessions[name] = open_session(engine.folder / "model.onnx", session_options(threads))
        found = milliseconds(sessions, feed, runs)
    click.echo(f"{'feed-forward ' + str(batch) + 'x' + str(tokens):26} {'ms':>8} {'to ' + dense:>14}  fused")
    for name, median in found.items():
        click.echo(f"{name:26} {median:8.1f} {found[dense] / median:13.2f}x  {fused[name]}")


if __name__ == "__main__":
    main()
