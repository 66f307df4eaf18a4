"""How long one attention takes on this CPU in float and with rounded parts, in the forms that engines hold.

    python -m tools.bench_attention --tokens 1024 --heads 4 --width 64

All forms run in turns, one thread, so that a busy machine slows them alike; medians.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import numpy as np
import onnx_ir as ir

from ditq.export.onnx_graph import DOMAIN, OPSET, ROUNDED_ATTENTION
from ditq.export.session import open_session, session_options
from ditq.export.targets.onnxruntime_cpu import lower
from ditq.numerics.attention_rounding import AttentionFormat
from tools.measure_recipes import table

FORMS: dict[str, AttentionFormat | None] = {
    "float32": None,
    "int8 qk": AttentionFormat("int8", "qk"),
    "int8 pv": AttentionFormat("int8", "vp"),
    "int8 qkvp": AttentionFormat("int8"),
    "float8_e4m3 qkvp": AttentionFormat("float8_e4m3"),
}


def graph_of(form: AttentionFormat | None, heads: int, tokens: int, width: int) -> ir.Model:
    """Queries, keys, values [1, heads, tokens, width] -> attention, lowered for the CPU; None is not rounded."""
    floats, shape = ir.TensorType(ir.DataType.FLOAT), [1, heads, tokens, width]
    given = [ir.Value(name=name, shape=ir.Shape(shape), type=floats) for name in ("query", "key", "value")]
    if form is None:
        node = ir.node("Attention", given)
    else:
        settings: dict[str, Any] = {"number": form.number, "parts": form.parts, "smooth_keys": int(form.smooth_keys)}
        node = ir.node(ROUNDED_ATTENTION, given, {"site": "attention", "scale": width**-0.5, **settings}, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", floats, ir.Shape(shape)
    opsets = {"": OPSET, DOMAIN: 1, "com.microsoft": 1}
    model = ir.Model(ir.Graph(given, [y], nodes=[node], opset_imports=opsets, name="attention"), ir_version=10)
    lower(model, {})
    return model


@click.command()
@click.option("--tokens", default=1024, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--width", default=64, show_default=True, help="Channels of a head.")
@click.option("--runs", default=21, show_default=True)
def main(tokens: int, heads: int, width: int, runs: int) -> None:
    """Print one row for each form."""
    generator = np.random.default_rng(0)
    inputs = {
        name: generator.standard_normal((1, heads, tokens, width)).astype(np.float32)
        for name in ("query", "key", "value")
    }
    sessions = {}
    for name, form in FORMS.items():
        graph = ir.to_proto(graph_of(form, heads, tokens, width)).SerializeToString()
        sessions[name] = open_session(graph, session_options(1))
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(runs):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, inputs)
            times[name].append(1000 * (time.perf_counter() - began))
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = [[name, f"{ms:.1f}", f"{medians['float32'] / ms:.2f}x"] for name, ms in medians.items()]
    table([f"attention, {tokens} tokens, {heads} heads of {width}", "ms", "speed"], rows)


if __name__ == "__main__":
    main()
