"""What it saves to compute a prompt's keys and values once: multiply-adds by size, and the time of a denoiser call.

    python -m tools.bench_text

PixArt-Sigma's shape (28 blocks of width 1152, 300 text tokens of width 4096) counted at each picture size, and timed with
two of its blocks behind a narrow caption projection, since 28 blocks share one; and the built-in mini-pixart with the inputs
of a real call. Token linears are w4a8, weights rounded to the nearest level. Both engines run on one thread and take turns;
times are those of the processor, which other work on the machine lengthens little. What counts is the ratio of the medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from accelerate import init_empty_weights
from diffusers import PixArtTransformer2DModel
from torch import nn

from ditq.checkpoint import Checkpoint
from ditq.export import load_engine, write_engine
from ditq.families import family_of
from ditq.graph import DiTGraph
from ditq.nn import ActivationFormat, QuantLinear
from ditq.numerics.codebooks import CODEBOOKS
from ditq.numerics.weight_code import encode
from ditq.report.speed import real_call

TEXT_TOKENS = 300
SIGMA = {
    "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152,
    "in_channels": 4, "out_channels": 8, "patch_size": 2, "use_additional_conditions": False,
}  # fmt: skip


def sigma(side: int, blocks: int, caption_width: int) -> nn.Module:
    """Random weights."""
    builder: Any = PixArtTransformer2DModel
    model: nn.Module = builder(**SIGMA, caption_channels=caption_width, sample_size=side, num_layers=blocks)
    return model.eval().requires_grad_(False)


def sigma_inputs(side: int, caption_width: int, batch: int = 2) -> dict[str, Any]:
    """A call with guidance in one batch, for a picture of 8 `side` pixels."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 4, side, side, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, caption_width, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, dtype=torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def counted(side: int) -> tuple[float, float]:
    """(multiply-adds of a call for one sample, those of them that see only the text), in units of 10^9."""
    with init_empty_weights(include_buffers=False):
        model = sigma(side, 28, 4096)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    graph = DiTGraph(model, sigma_inputs(side, 4096))
    family = family_of(type(model).__name__)
    assert family is not None
    total = sum(site.macs for site in graph.sites.values()) + sum(found.macs for found in graph.attentions.values())
    return total / 1e9, sum(graph.sites[site].macs for site in graph.text_sites(family.changing)) / 1e9


def quantized(model: nn.Module) -> nn.Module:
    """Its blocks' token linears as w4a8."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "blocks" in name and "norm" not in name:
            code = encode(linear.weight, CODEBOOKS["twin_log_shared"](linear.weight, 4))
            layer = QuantLinear(name, code, linear.bias, ActivationFormat(8, "token"))
            model.set_submodule(name, layer)
    return model


def timed(model: nn.Module, inputs: Mapping[str, Any], runs: int) -> dict[str, float]:
    """Milliseconds of a call: `without`, `with` the text cached, and `first`, with a text not seen before."""
    family = family_of(type(model).__name__)
    assert family is not None
    described: dict[str, Any] = {"name": "bench", "family": None, "fingerprint": "", "recipe": {}, "axes": family.axes}
    described |= {"config": dict(model.config), "class_name": type(model).__name__}  # type: ignore[arg-type]
    fresh = [dict(inputs) for _ in range(runs + 1)]
    for index, call in enumerate(fresh):
        call["encoder_hidden_states"] = call["encoder_hidden_states"] + 1e-3 * (index + 1)
    times: dict[str, list[float]] = {"without": [], "with": [], "first": []}
    with TemporaryDirectory(prefix="ditq-bench-") as place:
        engines = {}
        for name, changing in (("without", None), ("with", family.changing)):
            write_engine(Path(place) / name, model, inputs=inputs, changing=changing, **described)
            engines[name] = load_engine(Path(place) / name, threads=1)
        for index in range(runs + 1):
            engines["with"](**inputs)
            for name, given in (("without", inputs), ("with", inputs), ("first", fresh[index])):
                start = time.process_time()
                engines["without" if name == "without" else "with"](**given)
                times[name].append(1e3 * (time.process_time() - start))
        assert torch.equal(engines["with"](**inputs).sample, engines["without"](**inputs).sample)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


@click.command(help=__doc__)
@click.option("--runs", default=9, show_default=True)
@click.option("--mini-only", is_flag=True, help="Leave out the blocks of PixArt-Sigma's width, which take minutes.")
def main(runs: int, mini_only: bool) -> None:
    torch.set_num_threads(1)
    click.echo(f"{'PixArt-Sigma, one sample':26} {'10^9 MACs':>10} {'text only':>10} {'share':>7}")
    for side in (32, 64, 128):
        total, text = counted(side)
        click.echo(f"{f'{8 * side} x {8 * side} pixels':26} {total:10.1f} {text:10.1f} {100 * text / total:6.1f}%")
    click.echo(f"\n{'ms a call':26} {'without':>10} {'with':>10} {'first':>10} {'ratio':>7}")
    cases: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    mini = Checkpoint.open("mini-pixart")
    cases["mini-pixart"] = mini.load_model(), real_call(mini, mini.load_model())
    for side in () if mini_only else (32, 64):
        torch.manual_seed(0)
        cases[f"two blocks, {8 * side} x {8 * side}"] = sigma(side, 2, 64), sigma_inputs(side, 64)
    for name, (model, inputs) in cases.items():
        found = timed(quantized(model), inputs, runs)
        ratio = f"{found['without'] / found['with']:.2f}x"
        click.echo(f"{name:26} {found['without']:10.1f} {found['with']:10.1f} {found['first']:10.1f} {ratio:>7}")


if __name__ == "__main__":
    main()
