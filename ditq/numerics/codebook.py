"""Codebooks and the codes that they make: the one place to import both from.

`CODEBOOKS[name](weight, bits, ...)` fits levels to a weight; `encode` or `rounding.round_gptq` picks one for each.
"""

from ditq.numerics.codebooks import CODEBOOKS, Fitter, codebook
from ditq.numerics.codebooks.twin_log import fit_twin_log
from ditq.numerics.codebooks.twin_log_shared import fit_twin_log_shared
from ditq.numerics.codebooks.uniform import fit_uniform
from ditq.numerics.low_rank import LowRank
from ditq.numerics.weight_code import Fit, WeightCode, encode

__all__ = [
    "CODEBOOKS",
    "Fit",
    "Fitter",
    "LowRank",
    "WeightCode",
    "codebook",
    "encode",
    "fit_twin_log",
    "fit_twin_log_shared",
    "fit_uniform",
]
