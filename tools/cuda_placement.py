"""Which nodes of engines ONNX Runtime's own CUDA provider takes, found out on a machine without a GPU.

    python -m venv gpu && gpu/bin/pip install onnxruntime-gpu           # in an environment of its own
    python -m tools.cuda_placement --python gpu/bin/python engine [engine ...]

The provider decides while a session is opened, by the kernels that it has registered, and asks the GPU for little more than its
name. So it is given a CUDA whose functions do nothing but hand out memory: libraries with the names and symbols that it wants,
compiled here with the C compiler. It loads the weights into that memory, places every node, and writes down the graph that it
would run. Nothing is computed. Needs `readelf` and a C compiler; Linux.

Prints, of each graph, the operators on the GPU and those left to the CPU, and copies between them; the exit code is 1 if a
planned low-bit product is not on the GPU, or a product of matrices is left to the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import onnx

from ditq.export import Engine
from ditq.export.providers.choice import CUDA
from ditq.export.providers.proof import CPU, Placed, report

LIBRARY = "libonnxruntime_providers_cuda.so"
# Functions that must give an answer; all others return 0, success, and do nothing. A GPU of compute capability 8.9 with 80 GB.
ANSWERS = {
    "cudaGetDeviceProperties": "(char *p, int d) { memset(p, 0, 1008); *(size_t *)(p + 288) = (size_t)80 << 30;"
    " *(size_t *)(p + 296) = 49152; *(int *)(p + 304) = 65536; *(int *)(p + 308) = 32; *(int *)(p + 320) = 1024;"
    " *(int *)(p + 360) = 8; *(int *)(p + 364) = 9; *(int *)(p + 388) = 108; return 0; }",
    "cudaGetDeviceCount": "(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "(int *n) { *n = 0; return 0; }",
    "cudaDeviceGetAttribute": "(int *v, int a, int d)"
    " { *v = a == 75 ? 8 : a == 76 ? 9 : a == 16 ? 108 : a == 10 ? 32 : 0; return 0; }",
    "cudaMalloc": "(void **p, size_t n) { *p = aligned_alloc(256, (n + 256) / 256 * 256); return 0; }",
    "cudaMallocHost": "(void **p, size_t n) { *p = malloc(n); return 0; }",
    "cudaHostAlloc": "(void **p, size_t n, unsigned f) { *p = malloc(n); return 0; }",
    "cudaMallocFromPoolAsync": "(void **p, size_t n, void *a, void *b) { *p = malloc(n); return 0; }",
    "cudaFree": "(void *p) { free(p); return 0; }",
    "cudaFreeHost": "(void *p) { free(p); return 0; }",
    "cudaFreeAsync": "(void *p, void *s) { free(p); return 0; }",
    "cudaMemcpy": "(void *d, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }",
    "cudaMemcpyAsync": "(void *d, const void *s, size_t n, int k, void *t) { memcpy(d, s, n); return 0; }",
    "cudaMemset": "(void *d, int v, size_t n) { memset(d, v, n); return 0; }",
    "cudaMemsetAsync": "(void *d, int v, size_t n, void *s) { memset(d, v, n); return 0; }",
    "cudaMemGetInfo": "(size_t *f, size_t *t) { *f = (size_t)70 << 30; *t = (size_t)80 << 30; return 0; }",
    "cudaPointerGetAttributes": "(char *p, const void *q) { memset(p, 0, 32); *(int *)p = 2; return 0; }",
    "cudaRuntimeGetVersion": "(int *v) { *v = 13000; return 0; }",
    "cudaDriverGetVersion": "(int *v) { *v = 13000; return 0; }",
    "cudaStreamIsCapturing": "(void *s, int *v) { *v = 0; return 0; }",
    "cudaFuncGetAttributes": "(char *p, const void *f) { memset(p, 0, 128); return 0; }",
    "cudaGetDriverEntryPointByVersion": "(const char *n, void **f, unsigned v, unsigned long long l, int *s)"
    " { *f = 0; if (s) *s = 1; return 0; }",
    "cublasGetMathMode": "(void *h, int *m) { *m = 0; return 0; }",
}  # fmt: skip
HANDLES = ("Create", "CreateWithFlags", "Create_v2", "Instantiate")  # how functions end that hand out something to hold
TEXTS = ("ErrorName", "ErrorString", "StatusName", "StatusString")

PROBE = """
import json, sys
import onnxruntime
onnxruntime.set_default_logger_severity(4)
found = {}
for number, graph in enumerate(json.loads(sys.argv[1])):
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
print(json.dumps(found))
"""


def wanted_symbols(library: Path) -> dict[str, list[str]]:
    """What the provider wants of each library of CUDA, by the library's name."""
    said = subprocess.run(
        ["readelf", "-W", "--dyn-syms", "-d", library], check=True, capture_output=True, text=True
    ).stdout
    libraries = [line.split("[")[1].rstrip("]") for line in said.splitlines() if "(NEEDED)" in line]
    wanted: dict[str, list[str]] = {name: [] for name in libraries if name.startswith(("libcu", "libnv"))}
    for line in said.splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[6] != "UND":
            continue
        symbol, _, version = fields[7].partition("@")
        owner = version if version in wanted else next((name for name in wanted if name.startswith("libcuda.")), "")
        if version in wanted or (not version and symbol.startswith("cu")):
            wanted[owner].append(symbol)
    return wanted


def source_of(symbols: Iterable[str]) -> str:
    """C of functions that do nothing, or what ANSWERS says."""
    lines = ["#include <stdlib.h>", "#include <string.h>", "int loaded(void) { return 1; }", "static void *none[64];"]
    for symbol in symbols:
        if symbol in ANSWERS:
            lines.append(f"int {symbol}{ANSWERS[symbol]}")
        elif symbol == "__cudaRegisterFatBinary":
            lines.append(f"void **{symbol}(void *p) {{ return none; }}")
        elif symbol.endswith(TEXTS):
            lines.append(f'const char *{symbol}(int e) {{ return "none"; }}')
        elif symbol.endswith(HANDLES):
            lines.append(f"int {symbol}(void **p) {{ *p = malloc(64); return 0; }}")
        else:
            lines.append(f"int {symbol}(void) {{ return 0; }}")
    return "\n".join(lines) + "\n"


def compile_cuda(wanted: Mapping[str, Iterable[str]], folder: Path) -> None:
    """The libraries, in the folder."""
    for name, symbols in wanted.items():
        code, versions = folder / f"{name}.c", folder / f"{name}.map"
        code.write_text(source_of(symbols))
        versions.write_text(f"{name} {{ global: *; }};\n")
        settings = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{name}"]
        settings += [] if name.startswith("libcuda.") else [f"-Wl,--version-script={versions}"]
        subprocess.run(["cc", *settings, code, "-o", folder / name], check=True)


@dataclass(frozen=True)
class Opened:
    """A graph as the provider took it. placed: by node, operator and provider; run: operators of what it would then run."""

    placed: Mapping[str, Placed]
    run: Counter[str]


def opened_with_cuda(python: str, graphs: Sequence[Path]) -> dict[Path, Opened]:
    """Each graph, opened by that interpreter's ONNX Runtime."""
    where = "import onnxruntime, os; print(os.path.dirname(onnxruntime.__file__))"
    package = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="ditq-cuda-") as folder:
        compile_cuda(wanted_symbols(Path(package) / "capi" / LIBRARY), Path(folder))
        names = json.dumps([str(graph) for graph in graphs])
        environment = {**os.environ, "LD_LIBRARY_PATH": folder}
        ran = subprocess.run(
            [python, "-c", PROBE, names, folder], check=True, capture_output=True, text=True, env=environment
        )
        models = [onnx.load(f"{folder}/{number}.onnx", load_external_data=False) for number in range(len(graphs))]
    read = json.loads(ran.stdout.splitlines()[-1])
    placed = [{name: (kind, by) for name, kind, by in read[str(graph)]} for graph in graphs]
    kinds = [Counter(node.op_type for node in model.graph.node) for model in models]
    return dict(zip(graphs, map(Opened, placed, kinds), strict=True))


def listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) or "nothing"


@click.command()
@click.argument("engines", nargs=-1, required=True)
@click.option("--python", required=True, help="The interpreter of an environment with onnxruntime-gpu.")
def main(engines: tuple[str, ...], python: str) -> None:
    opened = [Engine.open(engine) for engine in engines]
    places = {(engine.name, graph): engine.folder.resolve() / graph for engine in opened for graph in engine.graphs}
    found = opened_with_cuda(python, list(places.values()))
    complete = True
    for engine in opened:
        graphs = {graph: found[places[engine.name, graph]] for graph in engine.graphs}
        proof = report(engine, {graph: taken.placed for graph, taken in graphs.items()}, CUDA)
        complete &= proof.complete
        click.echo(f"{engine.name}: {proof}")
        for graph, taken in graphs.items():
            for by, what in ((CUDA, "on the GPU"), (CPU, "on the CPU")):
                kinds = Counter(operator for operator, provider in taken.placed.values() if provider == by)
                click.echo(f"  {graph} {what}: {listed(kinds)}")
            copies = sum(count for kind, count in taken.run.items() if kind.startswith("Memcpy"))
            click.echo(f"  {graph} copies between them: {copies}")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
