"""Export: a compressed graph -> ONNX -> an engine folder, its targets, and the loader."""

from ditq.export.agreement import site_agreement
from ditq.export.baseline import float_onnx
from ditq.export.engine import Engine, write_engine
from ditq.export.fusion import FusionReport, prove_fusion
from ditq.export.loader import EngineTransformer, load_engine
from ditq.export.onnx_graph import to_onnx
from ditq.export.targets import targets

__all__ = [
    "Engine",
    "EngineTransformer",
    "FusionReport",
    "float_onnx",
    "load_engine",
    "prove_fusion",
    "site_agreement",
    "targets",
    "to_onnx",
    "write_engine",
]
