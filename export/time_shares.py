"""Where the time of a call goes, by kinds of work: read off ONNX Runtime's own profile, or off the names of a GPU's kernels.

products       matrix products and convolutions, low-bit or not
attention      softmax attention in whatever form, rounded, windowed or linear ones included
rotation       what the recipe adds in front of products: scales, centring, rotations
quantization   scales of tokens, rounding, and the scales behind integer products
rest           norms, modulation, biases, residuals, reshaping
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ditq.export.engine import TEXT_GRAPH, Engine
from ditq.export.session import open_session, session_options
from ditq.kernels.kernel_times import kernel_times, kind_of_kernel
from ditq.nn.call_timestep import ARGUMENT

KINDS = ("products", "attention", "rotation", "quantization", "rest")
Shares = dict[str, float]

_PRODUCTS = re.compile(r"MatMul|Gemm|Conv|Einsum")
_OF_ATTENTION = re.compile(r"scaled_dot_product_attention/|/(rounded|(local|linear|sparse)_attention|compress_keys)/")
_OF_TRANSFORM = re.compile(r"rotation|scaled|centred|piece|joined|widths")
_BEHIND = re.compile(r"biased|with_branch|bias")
_RUNS = 3


def kind_of(operator: str, node: str, sites: Collection[str]) -> str:
    """Of a node of an engine's graph, which `lowering` has named after the linear that it belongs to."""
    if operator in ("MultiHeadAttention", "Attention") or _OF_ATTENTION.search(node):
        return "attention"
    site, _, step = node.partition("/")
    if site in sites and _OF_TRANSFORM.match(step):
        return "rotation"
    if _PRODUCTS.search(operator):
        return "products"
    return "rest" if site not in sites or _BEHIND.match(step) else "quantization"


def shares(times: Iterable[tuple[str, float]]) -> Shares:
    """Of (kind, time) pairs, the share of each kind."""
    sums: dict[str, float] = defaultdict(float)
    for kind, time in times:
        sums[kind] += time
    total = sum(sums.values())
    return {kind: sums[kind] / total if total else 0.0 for kind in KINDS}


def of_session(engine: Engine, inputs: Mapping[str, Tensor], threads: int | None = None) -> Shares:
    """Of the graph that a call runs, on the CPU, the text's being known; a first call is not counted."""
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    graph = engine.graph_at(inputs.get(ARGUMENT))
    if engine.text is not None:
        session = open_session(engine.folder / TEXT_GRAPH, session_options(threads))
        made = session.run(engine.text["outputs"], {item.name: arrays[item.name] for item in session.get_inputs()})
        arrays |= dict(zip(engine.text["outputs"], made, strict=True))
    with tempfile.TemporaryDirectory(prefix="ditq-profile-") as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(engine.folder / graph, options)
        for _ in range(1 + _RUNS):
            session.run(None, {item.name: arrays[item.name] for item in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return shares(_nodes(events, engine.sites))


def _nodes(events: Iterable[Mapping[str, Any]], sites: Collection[str]) -> list[tuple[str, float]]:
    """(kind, microseconds) of the nodes that ran after the first call."""
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    end = "_kernel_time"
    return [
        (kind_of(event["args"]["op_name"], event["name"].removesuffix(end), sites), event["dur"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(end) and event["ts"] >= starts[1]
    ]


def of_kernels(call: Callable[[], object]) -> Shares:
    """Of what a call runs on the GPU."""
    return shares((kind_of_kernel(name), time) for name, time in kernel_times(call))
