"""Proof of fusion: which planned integer matmuls really run as integer kernels, read off the runtime's own graph."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from ditq.export.engine import Engine
from ditq.export.fusion_report import FusionReport
from ditq.export.session import open_session, session_options

INTEGER_KERNELS = frozenset(
    {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "QGemm"}
)


def prove_fusion(engine: Engine | str | Path) -> FusionReport:
    """Build the ONNX Runtime session, read back the graph that it made, and look for each planned integer matmul.

    Raises:
        DitqError: ONNX Runtime does not take the graph.
    """
    if not isinstance(engine, Engine):
        engine = Engine.open(engine)
    integer = [entry for entry in engine.planned if entry.kind == "integer"]
    makers = {graph: kernels_of(engine.folder / graph) for graph in engine.graphs}
    fused: dict[str, str] = {}
    not_fused: dict[str, str] = {}
    for entry in integer:
        products = entry.coded if entry.inner is None else (*entry.coded, entry.inner)
        kernels = [makers[entry.graph].get(product, "vanished from the graph") for product in products]
        slow = next((kernel for kernel in kernels if kernel not in INTEGER_KERNELS), None)
        (fused if slow is None else not_fused)[entry.site] = slow or kernels[0]
    fused = {site: kernel for site, kernel in fused.items() if site not in not_fused}  # it may stand in several graphs
    return FusionReport(len({entry.site for entry in integer}), fused, not_fused)


def kernels_of(graph: Path) -> dict[str, str]:
    """What ONNX Runtime runs, by the name of each value that it makes: {output: operator}."""
    with tempfile.TemporaryDirectory(prefix="ditq-fusion-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = session_options(threads=1)
        options.optimized_model_filepath = str(optimized)
        # Weights go into a file beside it, so that a graph of any size can be saved.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        open_session(graph, options)
        model = onnx.load(str(optimized), load_external_data=False)
    return {output: node.op_type for node in model.graph.node for output in node.output if output}
