"""Export: a compressed graph -> ONNX -> an engine folder, its targets, and the loader."""

from ditq.export.agreement import ModelAgreement, model_agreement, site_agreement
from ditq.export.baseline import float_onnx
from ditq.export.engine import Engine
from ditq.export.float64 import Float64Agreement, float64_agreement
from ditq.export.fusion import prove_fusion
from ditq.export.fusion_report import FusionReport
from ditq.export.loader import EngineTransformer, load_engine
from ditq.export.onnx_graph import to_onnx
from ditq.export.targets import targets
from ditq.export.write import write_engine

__all__ = [
    "Engine",
    "EngineTransformer",
    "Float64Agreement",
    "FusionReport",
    "ModelAgreement",
    "float64_agreement",
    "float_onnx",
    "load_engine",
    "model_agreement",
    "prove_fusion",
    "site_agreement",
    "targets",
    "to_onnx",
    "write_engine",
]
