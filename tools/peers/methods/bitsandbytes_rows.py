"""bitsandbytes by its own layers, on the token linears: NF4 in blocks of 64 (QLoRA, arXiv 2305.14314), and int8.

`Linear8bitLt` computes with dequantized weights on a CPU; its integer product, which quantizes activations too, needs
a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tools.peers.bench import Bench
from tools.peers.row import Outcome, add

BLOCK, NESTED = 64, 256


def apply(bench: Bench, kind: str, double: bool) -> Outcome:
    import bitsandbytes as bnb

    stored = {}
    for site in bench.token_sites:
        linear: Any = bench.graph.linear(site)
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        layer: nn.Module
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=6.0)
            bits = 8 + 32 / shape[0]
        else:
            layer = bnb.nn.Linear4bit(
                *shape, bias=bias, compute_dtype=torch.float32, quant_type=kind, compress_statistics=double
            )
            bits = 4 + (8 / BLOCK + 32 / (BLOCK * NESTED) if double else 32 / BLOCK)
        layer.load_state_dict(linear.state_dict())
        bench.graph.replace(
            site, layer.to("cpu").requires_grad_(False)
        )  # the weights are quantized when they are moved
        stored[site] = bits * linear.weight.numel()
    return Outcome(bench.graph.model, stored)


add("bitsandbytes NF4", "bitsandbytes", 16, partial(apply, kind="nf4", double=False))
add("bitsandbytes NF4, scales quantized", "bitsandbytes", 16, partial(apply, kind="nf4", double=True))
add("bitsandbytes FP4", "bitsandbytes", 16, partial(apply, kind="fp4", double=False))
add("bitsandbytes int8", "bitsandbytes", 16, partial(apply, kind="int8", double=False))
