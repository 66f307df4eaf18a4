"""QuantLinear: a linear with coded weights and, where wanted, quantized activations; its exact meaning in plain torch.

    x' = transform(x)                         online scale, centring, rotation (absent where folded)
    q  = round(x' / s_x), |q| <= 2^(b-1)-1    s_x per token or group of channels (dynamic), per
                                              tensor or timestep bin (static); or the odd integers
                                              of a mid-rise grid, or those of inputs with a shift,
                                              which the bias takes up (numerics/activation_format.py)
    c  = table[code]                          int8 carrier, or FP8 (numerics/carrier.py), whose q are
                                              FP8 numbers too; with group multipliers
                                              round(table[code] * m / 255) on the carrier's grid;
                                              or FP4 numbers times FP8 scales m of blocks (NVFP4),
                                              whose q are products of such as well
    y  = (q c^T) * s_x * s_w + bias           sum_g (q_g c_g^T) * s_xg * s_w + bias, with groups g of
                                              channels that have scales of their own

A low-rank branch (numerics/low_rank.py) adds (z A^T) B^T, A int8 rows with scales s_a and B int8. `branch` says what z is:
'integer' z = q s_x, so that the rows of A are further rows of the same integer product; 'float' z = x', which the rounding
of the input does not reach. With floating-point activations both are the same.

Kernels and every export form are tested against this forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F

from ditq.nn.input_transform import InputTransform
from ditq.numerics.activation_format import FLOAT, ActivationFormat
from ditq.numerics.carrier import CARRIERS, INT8, Carrier, carrier_of
from ditq.numerics.codebook import LowRank, WeightCode
from ditq.numerics.packing import pack, unpack
from ditq.numerics.timestep_bins import bin_of

Branch = Literal["integer", "float"]
Rounding = Callable[[str, Tensor], Tensor]
"""(site, inputs in steps of their grid) -> integers."""


class QuantLinear(nn.Module):
    """y = x W^T + b with W given by codes into a table of the carrier's numbers and scales.

    Buffers: `codes` packed uint8 (numerics/packing.py; the carrier [O, I] itself at 8 bits), `table` [L] or [O, L] in
    the carrier's dtype, `scale` float32 [O] or [O, G], `multiplier` uint8 or float8_e4m3fn [O, G], `bias` float32 [O],
    `activation_scale` float32 [], or [B] for B bins of timesteps; of a branch of rank r: `down` int8 [r, I], `up` int8
    [O, r], `branch_scale` float32 [r].
    """

    codes: Tensor
    table: Tensor | None
    scale: Tensor
    multiplier: Tensor | None
    bias: Tensor | None
    activation_scale: Tensor | None
    down: Tensor | None
    up: Tensor | None
    branch_scale: Tensor | None

    def __init__(
        self,
        site: str,
        weight: WeightCode,
        bias: Tensor | None,
        activation: ActivationFormat = FLOAT,
        activation_scale: Tensor | None = None,
        transform: InputTransform | None = None,
        codebook: str = "",
        branch: Branch = "integer",
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
        low_rank = weight.low_rank
        self.rank: int = 0 if low_rank is None else low_rank.rank
        self.branch: Branch = branch
        self.register_buffer("down", None if low_rank is None else low_rank.down)
        self.register_buffer("up", None if low_rank is None else low_rank.up)
        self.register_buffer("branch_scale", None if low_rank is None else low_rank.scale)
        if activation.granularity in ("tensor", "timestep") and activation_scale is None:
            raise ValueError(f"{site}: static activations need a calibrated scale")
        if activation.group_size and self.in_features % activation.group_size:
            raise ValueError(f"{site}: {self.in_features} inputs do not divide into groups of {activation.group_size}")
        if activation.granularity != "none" and self.scale.dim() == 2 and self.scale.shape[1] > 1:
            raise ValueError(f"{site}: an integer matmul takes one scale a row; give group multipliers instead")
        self._carrier: Tensor | None = None
        self.exporting = False
        self.rounding: Rounding | None = None
        self.timestep: Tensor | None = None  # of the call that runs (call_timestep.py)

    def carrier(self) -> Tensor:
        """The weight on its carrier's grid, in that dtype [O, I]."""
        return self.codes if self.bits == 8 else self.code().carrier()

    @property
    def carrier_kind(self) -> Carrier:
        """Which numbers the weight is made of."""
        return carrier_of(self.codes if self.table is None else self.table)

    def code(self) -> WeightCode:
        """The coded weight, as codebooks and rounding make it.

        Raises:
            ValueError: at 8 bits, where the carriers themselves are kept.
        """
        if self.table is None:
            raise ValueError(f"{self.site}: at 8 bits there is no table")
        codes = unpack(self.codes, self.bits, self.in_features)
        return WeightCode(codes, self.table, self.scale, self.multiplier, self.bits, self.low_rank(), self.codebook)

    def recode(self, code: WeightCode, bias: Tensor | None) -> None:
        """Take a code of the same form, and a bias, in place of what the layer has; the branch stays."""
        self.codes, self.table = pack(code.codes, self.bits), code.table
        self.scale, self.multiplier, self.bias = code.scale, code.multiplier, bias
        self.forget()

    def forget(self) -> None:
        """Decode the codes anew at the next call: they were changed, or what was decoded is to be freed."""
        self._carrier = None

    def fold_shift(self) -> None:
        """Put into the bias what the shift t of unsigned inputs adds: (q s - t) W^T = q s W^T - t sum_j W_j. Once, when made.

        A branch that reads the input in float is not reached by the shift.
        """
        weight = self._scaled(self.carrier().float()) if self.branch == "float" else self.weight()
        added = (-self.activation.shift * weight.double().sum(1)).float()
        self.bias = added if self.bias is None else self.bias + added

    def weight(self) -> Tensor:
        """The weight that the layer stands for, float32 [O, I], in the transformed input's basis."""
        weight = self._scaled(self.carrier().float())
        branch = self.low_rank()
        return weight if branch is None else weight + branch.product()

    def low_rank(self) -> LowRank | None:
        """The branch beside the coded weight."""
        if self.down is None or self.up is None or self.branch_scale is None:
            return None
        return LowRank(self.down, self.up, self.branch_scale)

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
            self._carrier = self.weight() if self.activation.granularity == "none" else self.carrier().float()
        if self.activation.granularity == "none":
            return F.linear(x, self._carrier, self.bias).to(dtype)
        q, step = self.quantized(x)
        y = self._product(q, step, self._carrier, self.scale.view(-1))
        if self.up is not None:
            y = y + F.linear(self._inner(x, q, step), self.up.float())
        return (y if self.bias is None else y + self.bias).to(dtype)

    def in_steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the transformed input in steps of its grid, within the grid's range but not rounded yet; the step).

        The step is as `ActivationFormat.scale_of` gives it: one a token or for all, or one a channel where groups have theirs.
        """
        step = self.activation.scale_of(x, self._calibrated())
        return self.activation.steps(x, step), step

    def _calibrated(self) -> Tensor | None:
        """The calibrated scale, that of the timestep's bin where there are several."""
        if self.activation.granularity != "timestep":
            return self.activation_scale
        if self.timestep is None:
            raise ValueError(
                f"{self.site}: its input has a scale a timestep bin; run the whole model, which tells the bin"
            )
        assert self.activation_scale is not None
        return self.activation_scale[bin_of(self.timestep, self.activation.edges).to(self.activation_scale.device)]

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(integers q of the transformed input, what one of them stands for: s_x)."""
        steps, step = self.in_steps(x)
        rounded = self.activation.nearest(steps) if self.rounding is None else self.rounding(self.site, steps)
        return self.activation.carriers(rounded), self.activation.unit(step)

    def rounded(self, x: Tensor) -> Tensor:
        """The transformed input as the layer's products see it: q s_x."""
        q, step = self.quantized(x)
        return q * step

    def _inner(self, x: Tensor, q: Tensor, step: Tensor) -> Tensor:
        """z A^T [..., r]: the input on the few directions of the branch."""
        assert self.down is not None and self.branch_scale is not None
        if self.branch == "float":
            return F.linear(x, self.down * self.branch_scale[:, None])
        return self._product(q, step, self.down.float(), self.branch_scale)

    def _product(self, q: Tensor, step: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        """(q s_x) (scale rows)^T for rows of integers; s_x leaves the sum where it is the same for all of a token's."""
        if self.activation.granularity == "group":
            return F.linear(q * step, rows) * scale
        return F.linear(q, rows) * scale * step

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
            "carrier": self.carrier_kind.name,
            "bias": self.bias is not None,
            "activation": asdict(self.activation),
            "rank": self.rank,
            "branch": self.branch,
            "transform": None if self.transform is None else self.transform.spec(),
            **shapes,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], state: dict[str, Tensor] | None = None) -> QuantLinear:
        """An empty layer of the same structure, for `load_state_dict`; `state` is needed for data-dependent rotations."""
        out_features, in_features, bits = spec["out_features"], spec["in_features"], spec["bits"]
        carrier = CARRIERS[spec.get("carrier", INT8.name)]  # absent in engines from before there were others
        table = torch.zeros(spec["table"], dtype=carrier.dtype) if spec["table"] else carrier.grid()
        multiplier = torch.zeros(spec["multiplier"], dtype=carrier.multiplier) if spec["multiplier"] else None
        low_rank, rank = None, spec.get("rank", 0)  # absent in engines from before there were branches
        if rank:
            down, up = (torch.zeros(shape, dtype=torch.int8) for shape in ((rank, in_features), (out_features, rank)))
            low_rank = LowRank(down, up, torch.zeros(rank))
        weight = WeightCode(
            torch.zeros(out_features, in_features, dtype=torch.uint8),
            table,
            torch.zeros(spec["scale"]),
            multiplier,
            bits,
            low_rank,
        )
        activation = ActivationFormat(**spec["activation"])
        scales = {"tensor": torch.zeros(()), "timestep": torch.zeros(len(activation.edges) + 1)}
        transform = None
        if spec["transform"]:
            transform = InputTransform.from_spec(spec["transform"], state, f"{spec['site']}.transform.")
        return cls(
            spec["site"],
            weight,
            torch.zeros(out_features) if spec["bias"] else None,
            activation,
            scales.get(activation.granularity),
            transform,
            spec["codebook"],
            spec.get("branch", "integer"),
        )

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._carrier = None
        super()._load_from_state_dict(*arguments, **keywords)

    def extra_repr(self) -> str:
        activation = "a16" if self.activation.granularity == "none" else f"a{self.activation.bits}"
        branch = f", rank {self.rank} ({self.branch})" if self.rank else ""
        return f"{self.in_features} -> {self.out_features}, w{self.bits}{activation} {self.codebook}{branch}"


@custom_op("ditq::quant_linear", mutates_args=())
def _quant_linear(x: Tensor, site: str, out_features: int) -> Tensor:
    """The opaque node that stands for a QuantLinear in an exported graph; only its shape is ever computed."""
    raise RuntimeError(f"{site}: ditq::quant_linear exists only in exported graphs")


@_quant_linear.register_fake
def _(x: Tensor, site: str, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
