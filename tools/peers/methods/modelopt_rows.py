"""NVIDIA Model Optimizer (nvidia-modelopt) by its own `quantize` and configurations, on the token linears.

The configurations' own exclusions are by names of language models (`*proj_out.*` among them, which is a token linear
of FLUX); they are replaced by: the token linears, nothing else. Blocks of 128 columns become 64, since 128 does not
divide a width of 192. Calibration runs the model on the recorded inputs, for AWQ's search on every fourth step. NVFP4
and MXFP4 configurations need a GPU. Quantization is simulated, as the library does before export; weights are folded
for speed.
"""

from __future__ import annotations

import contextlib
import copy
import io
from functools import partial
from typing import Any

from tools.peers.bench import Bench
from tools.peers.row import Outcome, add

GROUP = 64


def configuration(name: str, sites: list[str]) -> dict[str, Any]:
    """The library's configuration of that name for these linears alone."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, name))
    wanted = {item["quantizer_name"]: item for item in config["quant_cfg"]}
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind in ("weight_quantizer", "input_quantizer"):
        rule = wanted[f"*{kind}"]
        for part in rule["cfg"] if isinstance(rule.get("cfg"), list) else [rule.get("cfg", {})]:
            if "block_sizes" in part:
                part["block_sizes"] = {**part["block_sizes"], -1: GROUP}
        rules += [{**rule, "quantizer_name": f"{site}.{kind}"} for site in sites]
    return {**config, "quant_cfg": rules}


def apply(bench: Bench, config: str, bits: int, grouped: bool, rows: bool, scaled: bool, stride: int) -> Outcome:
    import modelopt.torch.quantization as mtq

    def run(model: Any) -> None:
        for call in bench.calibration_calls(stride):
            model(**call)

    sites = bench.token_sites
    with contextlib.redirect_stdout(io.StringIO()):
        model = mtq.quantize(bench.graph.model, configuration(config, sites), run)
        mtq.fold_weight(model)
    stored, online = {}, {}
    for site in sites:
        shape = bench.graph.sites[site]
        scales = shape.parameters // GROUP if grouped else (shape.out_features if rows else 1)
        stored[site] = shape.parameters * bits + 16 * scales
        if scaled:
            online[site] = 16 * shape.in_features
    return Outcome(model, stored, online)


for _name, _config, _activation, _settings in (
    ("INT8 SmoothQuant", "INT8_SMOOTHQUANT_CFG", 8, (8, False, True, True, 1)),
    ("INT8", "INT8_DEFAULT_CFG", 8, (8, False, True, False, 1)),
    ("FP8", "FP8_DEFAULT_CFG", 8, (8, False, False, False, 1)),
    ("W4A8 AWQ g64", "W4A8_AWQ_BETA_CFG", 8, (4, True, False, True, 4)),
    ("INT4 AWQ g64", "INT4_AWQ_CFG", 16, (4, True, False, True, 4)),
):
    _bits, _grouped, _rows, _scaled, _stride = _settings
    add(f"modelopt {_name}", "nvidia-modelopt", _activation,
        partial(apply, config=_config, bits=_bits, grouped=_grouped, rows=_rows, scaled=_scaled, stride=_stride))  # fmt: skip
