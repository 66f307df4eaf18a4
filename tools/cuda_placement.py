"""What ONNX Runtime's own CUDA provider makes of engines, found out on a machine without a GPU.

    python -m venv gpu && gpu/bin/pip install onnxruntime-gpu           # in an environment of its own
    python -m tools.cuda_placement --python gpu/bin/python --call engine [engine ...]

The provider decides while a session is opened, by the kernels that it has registered, and asks the GPU for little more than its
name. So it is given libraries of CUDA whose functions do nothing (tools/cuda_without_gpu.py). It loads the weights into that
memory, places every node, and writes down the graph that it would run. With --call it also runs each graph, on zeros of the
engine's usual sizes, and launches its kernels, which are counted by kinds. Nothing is computed.

Prints, of each graph, the operators on the GPU and those left to the CPU, copies between them, and the kernels of a call; the
exit code is 1 if a planned low-bit product is not on the GPU, or a product of matrices is left to the CPU. Graphs with a
convolution cannot be called: its kernel is chosen by cuDNN.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import onnx

from ditq.export import Engine
from ditq.export.plans.sizes import sizes_of
from ditq.export.providers.choice import CUDA
from ditq.export.providers.proof import CPU, Placed, report
from tools.cuda_without_gpu import compile_cuda, wanted_symbols

LIBRARY = "libonnxruntime_providers_cuda.so"
CALLED = "CALLED"
KINDS = (  # of kernels, the first that fits
    ("products of int8", re.compile(r"cublas 3 x 3 -> 10")),
    ("products of float16 with few-bit weights", re.compile(r"FpAIntB|fpA_intB")),
    ("few-bit weights expanded to float16", re.compile(r"Dequantize.*(Blockwise|Bits)", re.IGNORECASE)),
    ("products of float16", re.compile(r"cublas 2 x 2 -> 2")),
    ("products of float32", re.compile(r"cublas 0 x 0 -> 0")),
    ("attentions in one kernel", re.compile(r"flash_fwd_kernel|fmha", re.IGNORECASE)),
    ("others", re.compile(r"")),
)

PROBE = """
import json, sys
import numpy as np
import onnxruntime
onnxruntime.set_default_logger_severity(4)
found, types = {}, {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
for number, (graph, sizes) in enumerate(json.loads(sys.argv[1]).items()):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key in ("session.record_ep_graph_assignment_info", "ep.cuda.fpa_intb_gemm"):
        options.add_session_config_entry(key, "1")
    options.optimized_model_filepath = f"{sys.argv[2]}/{number}.onnx"
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    parts = session.get_provider_graph_assignment_info()
    found[graph] = [[node.name, node.op_type, part.ep_name] for part in parts for node in part.get_nodes()]
    given = {}
    if sizes is not None:
        shapes = {item: [sizes.get(size, size) for size in item.shape] for item in session.get_inputs()}
        given = {item.name: np.zeros(shape, types[item.type]) for item, shape in shapes.items()}
        session.run(None, given)  # the first call also tries tiles
    print("CALLED", file=sys.stderr, flush=True)
    if given:
        session.run(None, given)
    print("CALLED", file=sys.stderr, flush=True)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Opened:
    """A graph as the provider took it. placed: by node, operator and provider; run: operators of what it would then run;
    kernels: of a call, by kinds.
    """

    placed: Mapping[str, Placed]
    run: Counter[str]
    kernels: Counter[str]


def opened_with_cuda(python: str, graphs: Mapping[Path, Mapping[str, int] | None]) -> dict[Path, Opened]:
    """Each graph, opened by that interpreter's ONNX Runtime, and called where sizes of its axes are given."""
    where = "import onnxruntime, os; print(os.path.dirname(onnxruntime.__file__))"
    package = _ran([python, "-c", where], os.environ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="ditq-cuda-") as folder:
        compile_cuda(wanted_symbols(Path(package) / "capi" / LIBRARY), Path(folder))
        asked = json.dumps({str(graph): sizes for graph, sizes in graphs.items()})
        ran = _ran([python, "-c", PROBE, asked, folder], {**os.environ, "LD_LIBRARY_PATH": folder})
        models = [onnx.load(f"{folder}/{number}.onnx", load_external_data=False) for number in range(len(graphs))]
    read = json.loads(ran.stdout.splitlines()[-1])
    placed = [{name: (kind, by) for name, kind, by in read[str(graph)]} for graph in graphs]
    operators = [Counter(node.op_type for node in model.graph.node) for model in models]
    kernels = [kernels_of(said) for said in ran.stderr.split(f"{CALLED}\n")[1::2]]
    return dict(zip(graphs, map(Opened, placed, operators, kernels), strict=True))


def _ran(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=dict(environment))
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if line.strip() and not line.startswith("KERNEL ")]
        raise click.ClickException(said[-1] if said else f"{command[0]} ended with code {ran.returncode}")
    return ran


def kernels_of(said: str) -> Counter[str]:
    """Kernels by kinds, of what the libraries wrote down."""
    names = [line.removeprefix("KERNEL ") for line in said.splitlines() if line.startswith("KERNEL ")]
    return Counter(next(kind for kind, pattern in KINDS if pattern.search(name)) for name in names)


def listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) or "nothing"


@click.command()
@click.argument("engines", nargs=-1, required=True)
@click.option("--python", required=True, help="The interpreter of an environment with onnxruntime-gpu.")
@click.option("--call", is_flag=True, help="Run each graph and count the kernels that it launches.")
def main(engines: tuple[str, ...], python: str, call: bool) -> None:
    opened = [Engine.open(engine) for engine in engines]
    wanted: dict[Path, Mapping[str, int] | None] = {}
    for engine in opened:
        usual = {axis: three[1] for axis, three in sizes_of(engine).items()} if call else None
        wanted |= {engine.folder.resolve() / graph: usual for graph in engine.graphs}
    found, complete = opened_with_cuda(python, wanted), True
    for engine in opened:
        graphs = {graph: found[engine.folder.resolve() / graph] for graph in engine.graphs}
        proof = report(engine, {graph: taken.placed for graph, taken in graphs.items()}, CUDA)
        complete &= proof.complete
        click.echo(f"{engine.name}: {proof}")
        for graph, taken in graphs.items():
            for by, what in ((CUDA, "on the GPU"), (CPU, "on the CPU")):
                kinds = Counter(operator for operator, provider in taken.placed.values() if provider == by)
                click.echo(f"  {graph} {what}: {listed(kinds)}")
            copies = sum(count for kind, count in taken.run.items() if kind.startswith("Memcpy"))
            click.echo(f"  {graph} copies between them: {copies}")
            if call:
                click.echo(f"  {graph} kernels of a call: {listed(taken.kernels)}")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
