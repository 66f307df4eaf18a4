"""Products of the vendor's library, where its kernels multiply what ditq's would: bfloat16, and FP8 with scales of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.kernels.activation import activation_meaning
from ditq.kernels.matmul import Product


def library_product(product: Product, full: Tensor) -> Tensor:
    """y bfloat16 [M, N], or [samples E C, N] of experts, by a weight in full: bfloat16 or FP8 [N, K], bfloat16 [E N, K]."""
    y = _of_experts(product, full) if product.chosen is not None else _plain(product, full)
    return activation_meaning(y, product.activation)


def _plain(product: Product, full: Tensor) -> Tensor:
    bias = None if product.bias is None else product.bias.to(torch.bfloat16)
    if product.x_scale is None:
        y = F.linear(product.x, full, bias)
    else:
        scales = product.x_scale[:, None], product.stored.scale[None, :]
        y = torch._scaled_mm(product.x, full.T, *scales, bias, out_dtype=torch.bfloat16, use_fast_accum=True)
    return y if product.added is None else y + product.added


def _of_experts(product: Product, full: Tensor) -> Tensor:
    assert product.chosen is not None
    count, slots, outputs = product.size
    samples, experts = count // product.experts, product.experts
    rows = product.x[product.chosen.clamp_min(0)].view(samples, experts, slots, -1)
    result = rows @ full.view(experts, outputs, -1).transpose(1, 2)
    result = result if product.bias is None else result + product.bias.view(experts, 1, outputs).to(result.dtype)
    return torch.where((product.chosen >= 0).view(samples, experts, slots, 1), result, 0).view(-1, outputs)
