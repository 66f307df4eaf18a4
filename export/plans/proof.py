"""Proof of what a plan multiplies: TensorRT's own layers against the products that the engine means to be low-bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from ditq.errors import DitqError
from ditq.export.engine import Engine
from ditq.export.fusion_report import FusionReport
from ditq.export.plans.layers import Layer
from ditq.export.targets import PlannedMatMul

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_NUMBERS = {"integer": "Int8", "float8": "FP8", "float4": "FP4E2M1"}
_FEW_BIT = ("Int4", "Int8", "FP4")


def prove(engine: Engine) -> dict[str, FusionReport]:
    """For each plan of the engine, by GPU and library: which planned products are low-bit, and which products nobody planned.

    Raises:
        DitqError: what was written down of a plan is damaged.
    """
    named = {f"{plan['gpu']}, {plan['library']} {plan['version']}": plan for plan in engine.plans}
    return {name: proof_of(engine, _read(engine, plan)) for name, plan in named.items()}


def proof_of(engine: Engine, layers: Mapping[str, Sequence[Layer]]) -> FusionReport:
    """The same for layers by graph."""
    fused: dict[str, str] = {}
    not_fused: dict[str, str] = {}
    planned = [entry for entry in engine.planned if entry.kind in (*_NUMBERS, "weight-only kernel")]
    for entry in planned:
        products = entry.coded if entry.inner is None else (*entry.coded, entry.inner)
        found = [_made_by(product, entry, layers.get(entry.graph, ())) for product in products]
        wrong = next((kernel for kernel, low_bit in found if not low_bit), None)
        (fused if wrong is None else not_fused)[entry.site] = wrong or found[0][0]
    unplanned: dict[str, str] = {}
    for graph, built in layers.items():
        known = _products(engine.folder / graph)
        unplanned |= {layer.name: layer.types for layer in built if layer.multiplies and not known & set(layer.nodes)}
    fused = {site: kernel for site, kernel in fused.items() if site not in not_fused}  # it may stand in several graphs
    return FusionReport(len({entry.site for entry in planned}), fused, not_fused, unplanned, "low-bit")


def _made_by(product: str, entry: PlannedMatMul, layers: Sequence[Layer]) -> tuple[str, bool]:
    """(the layer that multiplies for the product, whether it does so in few bits)."""
    makers = [layer for layer in layers if layer.multiplies and product in layer.nodes]
    if not makers:
        return "vanished from the plan", False
    return f"{makers[0].kind} {makers[0].types}", all(_is_low_bit(layer, entry.kind) for layer in makers)


def _is_low_bit(layer: Layer, kind: str) -> bool:
    """Both sides numbers of the kind; of float inputs, the weight in at most 8 bits."""
    number = _NUMBERS.get(kind)
    if number is None:
        return bool(set(_FEW_BIT) & set(layer.constants))
    return number in layer.inputs and (number in layer.constants or layer.inputs.count(number) > 1)


def _products(path: Path) -> set[str]:
    """Names of the nodes of a graph that multiply matrices."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return {node.name for node in graph.node if node.op_type in _PRODUCTS}


def _read(engine: Engine, plan: Mapping[str, Any]) -> dict[str, list[Layer]]:
    path = engine.folder / plan["layers"]
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if set(read) != set(engine.graphs):  # which are read too, and no other file may be
            raise ValueError("not of the engine's graphs")
        return {graph: [Layer.from_json(entry) for entry in entries] for graph, entries in read.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DitqError(
            f"{path}: damaged; build the plan again with: ditq plan {engine.folder} --gpu {plan['gpu']}"
        ) from error
