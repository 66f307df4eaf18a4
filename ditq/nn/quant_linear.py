"""QuantLinear: a linear with coded weights and, where wanted, quantized activations; its exact meaning in plain torch.

    x' = transform(x)                         online scale, centring, rotation (absent where folded)
    q  = round(x' / s_x), |q| <= 2^(b-1)-1    s_x per token (dynamic) or per tensor (static)
    c  = table[code]                          int8 carrier; with group multipliers round(table[code] * m / 255)
    y  = (q c^T) * s_x * s_w + bias

Kernels and every export form are tested against this forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F

from ditq.nn.input_transform import InputTransform
from ditq.numerics.codebook import WeightCode
from ditq.numerics.packing import pack, unpack
from ditq.numerics.uniform import quantize_per_tensor, quantize_per_token

Granularity = Literal["token", "tensor", "none"]


@dataclass(frozen=True)
class ActivationFormat:
    """How the input is quantized: 'token' scales each token by its own maximum, 'tensor' uses one calibrated scale."""

    bits: int = 16
    granularity: Granularity = "none"

    @property
    def maximum(self) -> int:
        return 2 ** (self.bits - 1) - 1


class QuantLinear(nn.Module):
    """y = x W^T + b with W given by codes into an int8 table and scales.

    Buffers: `codes` packed uint8 (numerics/packing.py; int8 [O, I] itself at 8 bits), `table` int8 [L] or [O, L],
    `scale` float32 [O] or [O, G], `multiplier` uint8 [O, G], `bias` float32 [O], `activation_scale` float32 [].
    """

    codes: Tensor
    table: Tensor | None
    scale: Tensor
    multiplier: Tensor | None
    bias: Tensor | None
    activation_scale: Tensor | None

    def __init__(
        self,
        site: str,
        weight: WeightCode,
        bias: Tensor | None,
        activation: ActivationFormat = ActivationFormat(),
        activation_scale: Tensor | None = None,
        transform: InputTransform | None = None,
        codebook: str = "",
    ) -> None:
        super().__init__()
        self.site, self.codebook = site, codebook
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.activation = weight.bits, activation
        self.transform = None if transform is None or transform.is_identity else transform
        eight = weight.bits == 8
        self.register_buffer("codes", weight.carrier() if eight else pack(weight.codes, weight.bits))
        self.register_buffer("table", None if eight else weight.table)
        self.register_buffer("scale", weight.scale.float())
        self.register_buffer("multiplier", None if eight else weight.multiplier)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("activation_scale", activation_scale)
        if activation.granularity == "tensor" and activation_scale is None:
            raise ValueError(f"{site}: static activations need a calibrated scale")
        if activation.granularity != "none" and self.scale.dim() == 2 and self.scale.shape[1] > 1:
            raise ValueError(f"{site}: an integer matmul takes one scale a row; give group multipliers instead")
        self._carrier: Tensor | None = None
        self.exporting = False

    def carrier(self) -> Tensor:
        """The weight on its integer grid, int8 [O, I]."""
        if self.bits == 8:
            return self.codes
        codes = unpack(self.codes, self.bits, self.in_features)
        assert self.table is not None
        return WeightCode(codes, self.table, self.scale, self.multiplier, self.bits).carrier()

    def weight(self) -> Tensor:
        """The weight that the layer stands for, float32 [O, I], in the transformed input's basis."""
        return self._scaled(self.carrier().float())

    def _scaled(self, carrier: Tensor) -> Tensor:
        if self.scale.dim() == 1:
            return carrier * self.scale[:, None]
        groups = self.scale.shape[1]
        return (carrier.view(self.out_features, groups, -1) * self.scale[:, :, None]).view(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.exporting:
            return torch.ops.ditq.quant_linear(x, self.site, self.out_features)
        dtype = x.dtype
        x = x.float()
        if self.transform is not None:
            x = self.transform(x)
        if self._carrier is None or self._carrier.device != x.device:
            # Kept as floats: repeated calls dominate, and products of int8 values are exact in float32.
            carrier = self.carrier().float()
            self._carrier = self._scaled(carrier) if self.activation.granularity == "none" else carrier
        if self.activation.granularity == "none":
            return F.linear(x, self._carrier, self.bias).to(dtype)
        if self.activation.granularity == "token":
            q, step = quantize_per_token(x, self.activation.bits)
        else:
            assert self.activation_scale is not None
            q, step = quantize_per_tensor(x, self.activation_scale, self.activation.bits), self.activation_scale
        y = F.linear(q, self._carrier) * self.scale.view(-1) * step
        return (y if self.bias is None else y + self.bias).to(dtype)

    def spec(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        shapes = {
            name: None if buffer is None else list(buffer.shape)
            for name, buffer in (("table", self.table), ("scale", self.scale), ("multiplier", self.multiplier))
        }
        return {
            "site": self.site,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "codebook": self.codebook,
            "bias": self.bias is not None,
            "activation": asdict(self.activation),
            "transform": None if self.transform is None else self.transform.spec(),
            **shapes,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], state: dict[str, Tensor] | None = None) -> QuantLinear:
        """An empty layer of the same structure, for `load_state_dict`; `state` is needed for data-dependent rotations."""
        out_features, in_features, bits = spec["out_features"], spec["in_features"], spec["bits"]
        table = (
            torch.zeros(spec["table"], dtype=torch.int8) if spec["table"] else torch.arange(-128, 128).to(torch.int8)
        )
        multiplier = torch.zeros(spec["multiplier"], dtype=torch.uint8) if spec["multiplier"] else None
        weight = WeightCode(
            torch.zeros(out_features, in_features, dtype=torch.uint8),
            table,
            torch.zeros(spec["scale"]),
            multiplier,
            bits,
        )
        activation = ActivationFormat(**spec["activation"])
        transform = None
        if spec["transform"]:
            transform = InputTransform.from_spec(spec["transform"], state, f"{spec['site']}.transform.")
        return cls(
            spec["site"],
            weight,
            torch.zeros(out_features) if spec["bias"] else None,
            activation,
            torch.zeros(()) if activation.granularity == "tensor" else None,
            transform,
            spec["codebook"],
        )

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._carrier = None
        super()._load_from_state_dict(*arguments, **keywords)

    def extra_repr(self) -> str:
        activation = "a16" if self.activation.granularity == "none" else f"a{self.activation.bits}"
        return f"{self.in_features} -> {self.out_features}, w{self.bits}{activation} {self.codebook}"


@custom_op("ditq::quant_linear", mutates_args=())
def _quant_linear(x: Tensor, site: str, out_features: int) -> Tensor:
    """The opaque node that stands for a QuantLinear in an exported graph; only its shape is ever computed."""
    raise RuntimeError(f"{site}: ditq::quant_linear exists only in exported graphs")


@_quant_linear.register_fake
def _(x: Tensor, site: str, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@contextmanager
def exporting(model: nn.Module) -> Iterator[nn.Module]:
    """Within it every QuantLinear of `model` is one opaque node, which an export target lowers in its own form."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    try:
        for layer in layers:
            layer.exporting = True
        yield model
    finally:
        for layer in layers:
            layer.exporting = False
