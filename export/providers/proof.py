"""Proof of what ONNX Runtime multiplies on the GPU: which provider each planned product was given to, read off the session.

Without a GPU, what the CPU provider makes of the same graph: that no product was folded, fused or rewritten on the way. The two
providers share what comes before kernels are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from ditq.export.engine import Engine
from ditq.export.fusion_report import FusionReport
from ditq.export.providers.choice import NAMES
from ditq.export.providers.run import choice_of, opened, provider_list
from ditq.export.targets import PlannedMatMul, target

CPU = "CPUExecutionProvider"
_KERNELS = {"integer": "MatMulInteger", "weight-only kernel": "MatMulNBits"}
_PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulInteger", "MatMulNBits", "MultiHeadAttention")
Placed = tuple[str, str]  # (operator, provider)


def prove(engine: Engine) -> dict[str, FusionReport]:
    """What became of the planned products, by the provider that runs the engine here.

    Raises:
        DitqError: the provider does not load, or does not take a graph.
    """
    if not target("onnxruntime-cuda").available()[0]:
        placed = {graph: placement(opened(engine, graph, [(CPU, {})], 1)) for graph in engine.graphs}
        return {"the CPU provider, in place of CUDA's": report(engine, placed, CPU)}
    choice = choice_of(engine)
    placed = {
        graph: placement(opened(engine, graph, provider_list(engine, graph, choice, 0), None))
        for graph in engine.graphs
    }
    return {f"the {NAMES[choice.provider]} provider": report(engine, placed, choice.provider)}


def placement(session: Any) -> dict[str, Placed]:
    """By node: its operator, and the provider that was given it."""
    subgraphs = session.get_provider_graph_assignment_info()
    return {node.name: (node.op_type, part.ep_name) for part in subgraphs for node in part.get_nodes()}


def report(engine: Engine, placed: Mapping[str, Mapping[str, Placed]], provider: str) -> FusionReport:
    """Planned products that are low-bit kernels of the provider, the others, and any product that it left to the CPU."""
    planned = [entry for entry in engine.planned if entry.kind in _KERNELS]
    names = {graph: _node_names(engine, graph) for graph in engine.graphs}
    fused: dict[str, str] = {}
    not_fused: dict[str, str] = {}
    for entry in planned:
        found = [_found(names[entry.graph], placed[entry.graph], product) for product in _products_of(entry)]
        wrong = next((kernel for kernel in found if kernel != (_KERNELS[entry.kind], provider)), None)
        (fused if wrong is None else not_fused)[entry.site] = " by ".join(wrong or found[0])
    left = {
        name: f"{operator} on the CPU"
        for nodes in placed.values()
        for name, (operator, by) in nodes.items()
        if operator in _PRODUCTS and by == CPU != provider
    }
    fused = {site: kernel for site, kernel in fused.items() if site not in not_fused}  # it may stand in several graphs
    return FusionReport(len({entry.site for entry in planned}), fused, not_fused, left, "low-bit")


def _products_of(entry: PlannedMatMul) -> tuple[str, ...]:
    return entry.coded if entry.inner is None else (*entry.coded, entry.inner)


def _found(names: Mapping[str, str], placed: Mapping[str, Placed], product: str) -> Placed:
    return placed.get(names.get(product, ""), ("vanished from the graph", "no provider"))


def _node_names(engine: Engine, graph: str) -> dict[str, str]:
    """Nodes by what they make."""
    nodes = onnx.load(str(engine.folder / graph), load_external_data=False).graph.node
    return {output: node.name for node in nodes for output in node.output}
