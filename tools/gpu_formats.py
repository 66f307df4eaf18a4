"""Formats of linears for bench_gpu.py: ditq's, of generated weights, and what torch itself offers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.numerics.carrier import E4M3, FLOAT8, INT8, Carrier
from ditq.numerics.rotation import block_hadamard_rotation
from ditq.numerics.weight_code import WeightCode

GROUP, BLOCK = 64, 64


@dataclass(frozen=True)
class Format:
    """bits of the weight, format of the input, whether columns have scales in groups and inputs are rotated."""

    bits: int
    activation: ActivationFormat
    grouped: bool = True
    rotated: bool = True
    carrier: Carrier = INT8


TOKEN = ActivationFormat(8, "token")
FORMATS = {
    "w8a8": Format(8, TOKEN, grouped=False),
    "w4a8": Format(4, TOKEN),
    "w4a8 without rotation": Format(4, TOKEN, rotated=False),
    "w3a8": Format(3, TOKEN),
    "w8a8 FP8": Format(8, ActivationFormat(8, "token", "float8_e4m3"), grouped=False, carrier=FLOAT8),
    "w4a8 FP8": Format(4, ActivationFormat(8, "token", "float8_e4m3"), grouped=False, carrier=FLOAT8),
    "w4a16": Format(4, ActivationFormat(), rotated=False),
}


# --- what torch itself offers


class Float8Linear(nn.Module):
    """FP8 inputs and weights with a scale a token and a row: torch._scaled_mm."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.float().abs().amax(1, keepdim=True) / 448
        self.weight = (linear.weight.float() / scale).to(E4M3)
        self.scale, self.bias = scale.T.contiguous(), None if linear.bias is None else linear.bias.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scale = (tokens.abs().amax(1, keepdim=True).float() / 448).clamp_min(1e-8)
        q = (tokens.float() / scale).clamp(-448, 448).to(E4M3)
        return self.product(q, scale).view(*x.shape[:-1], -1)

    def product(self, q: Tensor, scale: Tensor) -> Tensor:
        """Of FP8 tokens [M, K] with scales [M, 1]."""
        return torch._scaled_mm(
            q, self.weight.T, scale, self.scale, self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


class Int8Linear(nn.Module):
    """int8 inputs and weights with a scale a token and a row: torch._int_mm."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.float().abs().amax(1) / 127
        self.weight = (linear.weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale, self.bias = scale, None if linear.bias is None else linear.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scale = (tokens.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-8)
        q = (tokens.float() / scale).round().to(torch.int8)
        y = torch._int_mm(q, self.weight.T).float() * scale * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


# --- ditq's layers of generated weights


def twin_log_table(bits: int, carrier: Carrier, mu: float = 8.0) -> Tensor:
    """Levels C_k = ((1 + mu)^((k + 1/2) / (n - 1/2)) - 1) / mu of both signs, on the carrier's grid (how-it-works.md)."""
    n = 2 ** (bits - 1)
    levels = ((1 + mu) ** ((torch.arange(n) + 0.5) / (n - 0.5)) - 1) / mu
    positive = carrier.distinct(carrier.largest(bits) * levels, carrier.largest(bits))
    return carrier.stored(torch.cat((-positive.flip(0), positive)))


def coded(weight: Tensor, form: Format) -> WeightCode:
    """weight [O, I] float32 -> the nearest levels, with a scale a row, and where grouped the groups' own range within it."""
    carrier, bits = form.carrier, form.bits
    table = carrier.grid() if bits == 8 else twin_log_table(bits, carrier)
    table = table.to(weight.device)
    top = float(table.float().abs().max()) - (1 if bits == 8 and carrier is INT8 else 0)
    grouped = form.grouped and weight.shape[1] % GROUP == 0
    parts = weight.unflatten(1, (-1, GROUP if grouped else weight.shape[1]))
    largest = parts.abs().amax(2)
    scale, multiplier = largest.amax(1) / top, None
    steps = largest / top
    if grouped and form.activation.granularity == "none":
        scale = steps
    elif grouped:
        multiplier = (steps / scale[:, None] * 255).ceil().clamp(1, 255).to(torch.uint8)
        steps = multiplier.float() / 255 * scale[:, None]
    levels = table.float()
    codes = torch.bucketize((parts / steps[:, :, None]).flatten(1), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return WeightCode(codes, table, scale, multiplier, bits)


def quantize(model: nn.Module, form: Format, device: torch.device) -> nn.Module:
    """A QuantLinear in the place of every linear but routers, one by one; of the modulation with inputs in floating point."""
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name.endswith("router"):
            continue
        weight = linear.weight.detach().to(device, torch.float32)
        transform, activation = None, form.activation
        if "modulation" in name:
            activation = ActivationFormat()
        elif form.rotated:
            rotation = block_hadamard_rotation(linear.in_features, math.gcd(linear.in_features, BLOCK))
            step = rotation.steps[0].apply(weight)  # type: ignore[union-attr]
            weight, transform = step, InputTransform(rotations=[(0, linear.in_features, rotation)])
        chosen = Format(4 if form.bits < 8 else 8, activation) if "modulation" in name else form
        code = coded(weight, chosen)
        bias = None if linear.bias is None else linear.bias.to(device)
        model.set_submodule(name, QuantLinear(name, code, bias, activation, transform=transform).to(device))
    return model


def with_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Another layer in the place of each linear over tokens; the modulation, whose single rows do not pay, and routers stay."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "modulation" not in name and not name.endswith("router"):
            model.set_submodule(name, make(linear))
    return model
