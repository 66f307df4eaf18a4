"""How time and memory of one attention grow with the picture: softmax, windows, linear, tiles; in torch and in ONNX Runtime.

    python -m tools.bench_linear_attention --heads 1 --plot docs/images/attention-cost.svg

Image tokens alone, random inputs, float32, one thread, forms as in engines. Each case runs in a process of its own, which
tells its memory. Time is what the processor spent on that process, which on a machine of its own is the time that passes;
the least of several runs counts, since a busy machine slows by its caches still. With --frames tokens are those of videos.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ditq.export.onnx_graph import DOMAIN, OPSET, TOKEN_ATTENTION
from ditq.export.session import open_session, session_options
from ditq.export.targets.onnxruntime_cpu import lower
from ditq.nn.structural.compressed_keys import CompressedKeys
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import TokenAttention
from ditq.numerics.sparse_attention import number_of_tiles
from ditq.numerics.token_layout import Grid, TokenLayout
from ditq.numerics.token_order import KINDS, Kind, TokenOrder
from ditq.numerics.window import Window
from ditq.report.plots import STYLE
from tools.measure_recipes import table

Form = Callable[[int, int, Grid], TokenAttention | None]  # of heads, of their channels, of the picture or video
DENSE = "softmax"
FORMS: dict[str, Form] = {
    DENSE: lambda heads, width, grid: None,
    "circle r=8": lambda heads, width, grid: _local(heads, width, Window("circle", 8, 8)),
    "3 x 3 tiles of 8 x 8": lambda heads, width, grid: _local(heads, width, Window("tiles", 3, 8)),
    "linear, relu": lambda heads, width, grid: LinearAttention("bench", TokenLayout(), heads, width, False, 0, "relu"),
    "keys of 2 x 2": lambda heads, width, grid: CompressedKeys("bench", TokenLayout(), heads, width, False, 0, 2),
    "9 tiles of 8 x 8, online": lambda heads, width, grid: _sparse(heads, width, None),
    "9 tiles of 8 x 8, calibrated": lambda heads, width, grid: _sparse(heads, width, (grid.height, grid.width)),
    "9 tiles of 8 x 8 and means, online": lambda heads, width, grid: _sparse(heads, width, None, True),
    "9 tiles of 8 x 8 and means, calibrated": lambda heads, width, grid: _sparse(
        heads, width, (grid.height, grid.width), True
    ),
}
VIDEO_FORMS: dict[str, Form] = {
    DENSE: FORMS[DENSE],
    "3 x 3 tiles of 4 x 8 x 8, all frames": lambda heads, width, grid: _local(
        heads, width, Window("tiles", 3, 8, 0, 4)
    ),
    "3 x 3 x 3 tiles of 4 x 8 x 8": lambda heads, width, grid: _local(heads, width, Window("tiles", 3, 8, 3, 4)),
}
ENGINES = ("torch", "onnxruntime")
FITTED_FROM = 1024  # tokens; with fewer, what is paid once for a call counts
COMPARED_AT = 4096


def _local(heads: int, width: int, window: Window) -> TokenAttention:
    return LocalAttention("bench", TokenLayout(), heads, width, False, 0, window)


def _sparse(heads: int, width: int, picture: tuple[int, int] | None, means: bool = False) -> TokenAttention:
    """Calibrated to any tiles: which ones makes no difference to the time."""
    keep = 9 if picture is None else min(9, number_of_tiles(8, *picture))
    part = SparseAttention("bench", TokenLayout(), heads, width, False, 0, 8, keep, picture, means)
    if part.seen is not None:
        tiles, generator = part.seen.shape[1], torch.Generator().manual_seed(0)
        part.seen.copy_(torch.rand(heads, tiles, tiles, generator=generator).argsort(-1)[..., :keep])
    return part


def onnx_model(part: TokenAttention | None, shape: list[int], grid: Grid) -> ir.Model:
    """Queries, keys, values -> the attention, lowered for the CPU; None is softmax over all tokens."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    given = [ir.Value(name=name, shape=ir.Shape(shape), type=floats) for name in ("query", "key", "value")]
    constants: list[ir.Value] = []
    if part is None:
        node = ir.node("Attention", given)
    else:
        sizes = [ir.tensor([number]) for number in (0, grid.height, grid.width, grid.frames)]
        tensors = [*sizes, *(ir.tensor(tensor.numpy()) for tensor in part.tensors())]
        for number, tensor in enumerate(tensors):
            kind = ir.TensorType(tensor.dtype)
            constants.append(
                ir.Value(name=f"constant{number}", const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=kind)
            )
        common = {"heads": part.heads, "width": part.width, "text": False, "usual": 0, "text_first": True}
        order = {} if grid.order is None else {"order": asdict(grid.order)}
        settings = json.dumps({**part.settings(), **common, **order})
        attributes: Mapping[str, Any] = {
            "site": "attention",
            "kind": part.kind,
            "settings": settings,
            "scale": part.width**-0.5,
        }
        moved = [None, None]  # where tokens lie, which is known here of the order
        node = ir.node(TOKEN_ATTENTION, [*given, *constants[:4], *moved, *constants[4:]], attributes, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", floats, ir.Shape(shape)
    opsets = {"": OPSET, DOMAIN: 1, "com.microsoft": 1}
    graph = ir.Graph(given, [y], nodes=[node], initializers=constants, opset_imports=opsets, name="attention")
    model = ir.Model(graph, ir_version=10)
    lower(model, {})
    return model


def caller(engine: str, part: TokenAttention | None, inputs: list[Tensor], grid: Grid) -> Callable[[], object]:
    """One call of the attention."""
    if engine == "torch":
        if part is None:
            query, key, value = inputs
            return lambda: F.scaled_dot_product_attention(query, key, value)
        part.grid = grid
        return lambda: part(*inputs, None, None)
    model = onnx_model(part, list(inputs[0].shape), grid)
    session = open_session(ir.to_proto(model).SerializeToString(), session_options(1))
    arrays = {name: tensor.numpy() for name, tensor in zip(("query", "key", "value"), inputs, strict=True)}
    return lambda: session.run(None, arrays)


def measured(engine: str, form: Form, grid: Grid, heads: int, width: int, runs: int) -> tuple[float, float]:
    """(milliseconds of the processor, megabytes beyond the inputs) of one call, the latter with what the session keeps."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, heads, grid.image, width, generator=generator) for _ in range(3)]
        before = _resident()
        with torch.no_grad():
            call = caller(engine, form(heads, width, grid), inputs, grid)
            times = []
            for _ in range(runs + 1):  # the first one warms up
                began = time.process_time()
                call()
                times.append(1000 * (time.process_time() - began))
        sender.send((min(times[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    sender.close()
    found: tuple[float, float] = receiver.recv()
    process.join()
    return found


def _resident() -> float:
    """Megabytes that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def exponent(times: Mapping[int, float]) -> float:
    """Of the power of the number of tokens that times grow with, by least squares on logarithms."""
    kept = {math.log(tokens): math.log(ms) for tokens, ms in times.items() if tokens >= FITTED_FROM}
    return float(np.polyfit(list(kept), list(kept.values()), 1)[0]) if len(kept) > 1 else math.nan


def draw(found: Mapping[tuple[str, int, str], Mapping[int, float]], path: Path) -> None:
    """Milliseconds over tokens, both axes logarithmic, one panel an engine."""
    width = min(width for _, width, _ in found)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.8, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, engine in zip(figure.subplots(1, len(ENGINES), sharey=True), ENGINES, strict=True):
            for marker, form in zip("osD^v*XPp", FORMS, strict=True):
                times = found.get((engine, width, form))
                if times is None:
                    continue
                axes.loglog(list(times), list(times.values()), marker=marker, label=form)
            axes.set(title=f"{engine}, heads of {width}", xlabel="image tokens")
            axes.grid(True)
        figure.axes[0].set_ylabel("milliseconds of one processor")
        figure.axes[0].legend()
        figure.savefig(path, format="svg", metadata={"Date": None})


@click.command()
@click.option("--heads", default=1, show_default=True)
@click.option("--widths", default="64,72", show_default=True, help="Channels of a head.")
@click.option(
    "--tokens", default="256,1024,4096,16384,65536", show_default=True, help="Each frame's a square of a whole number."
)
@click.option(
    "--frames", default=1, show_default=True, help="Above 1, of windows in videos, whose tokens are counted so."
)
@click.option("--order", type=click.Choice(KINDS), help="Of the tokens, windows of 8 x 8; by default row by row.")
@click.option("--dense-up-to", default=16384, show_default=True, help="Tokens beyond which softmax is left out.")
@click.option("--runs", default=5, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(FORMS)), help="Not all attentions, but these.")
@click.option("--plot", type=click.Path(path_type=Path), help="An SVG file to be written.")
def main(
    heads: int,
    widths: str,
    tokens: str,
    frames: int,
    order: Kind | None,
    dense_up_to: int,
    runs: int,
    only: tuple[str, ...],
    plot: Path | None,
) -> None:
    """Print one row for each engine, width and form."""
    sizes = [int(size) for size in tokens.split(",")]
    sides = {size: isqrt(size // frames) for size in sizes}
    forms, compared = (FORMS if frames == 1 else VIDEO_FORMS), COMPARED_AT if COMPARED_AT in sizes else sizes[-1]
    found: dict[tuple[str, int, str], dict[int, float]] = {}
    rows = []
    for engine in ENGINES:
        for width in (int(size) for size in widths.split(",")):
            for form in only or forms:
                cells, times = [], found.setdefault((engine, width, form), {})
                for size in sizes:
                    if form == DENSE and size > dense_up_to:
                        cells.append("-")
                        continue
                    grid = Grid(0, sides[size], sides[size], frames=frames, order=TokenOrder(order) if order else None)
                    times[size], megabytes = measured(engine, forms[form], grid, heads, width, runs)
                    cells.append(f"{times[size]:.2f} ms, {megabytes:.0f} MB")
                dense = found.get(("onnxruntime", width, DENSE), {}) if engine == "onnxruntime" else {}
                ratio = f"{dense[compared] / times[compared]:.1f}x" if compared in dense else "-"
                rows.append([engine, str(width), form, *cells, f"{exponent(times):.2f}", ratio])
    last = [f"exponent from {FITTED_FROM}", f"speed at {compared}"]
    table(["engine", "width", f"attention, heads: {heads}", *(f"{size} tokens" for size in sizes), *last], rows)
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    main()
