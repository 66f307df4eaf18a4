"""FastLinear: what stands in a QuantLinear's place on a GPU. The same transform, the same integers, the kernels' product.

It gives what QuantLinear gives, up to bfloat16: that of its input and output, and of what a low-rank branch makes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.kernels.online import Online, online
from ditq.kernels.operators import product, quantized
from ditq.kernels.storage import StoredWeight, store, store_carrier, why_not
from ditq.nn import QuantLinear
from ditq.nn.input_transform import InputTransform
from ditq.numerics.rotation import PermuteStep


def why_no_kernel(layer: QuantLinear, capability: int | None = None) -> str | None:
    """Why a layer cannot run here, or None. capability: of the GPU (90 for 9.0); None where it is not known yet."""
    form = layer.activation
    if form.granularity == "timestep":
        return "activations with a scale a timestep have no kernel; set activation: token"
    if form.grid == "unsigned" and form.bits == 8:
        return "unsigned activations of 8 bits have no kernel; set activation_unsigned: false"
    for grouped in (layer.multiplier, layer.scale if layer.scale.dim() == 2 else None):
        if grouped is not None and grouped.shape[1] > 1:
            group = layer.in_features // grouped.shape[1]
            if reason := why_not(group):
                fitting = next((size for size in (64, 32) if layer.in_features % size == 0), 0)
                return f"{reason}; set group_size: {fitting}"
    if form.granularity == "group" and form.group_size % 64:
        return f"groups of {form.group_size} channels have no kernel; set activation_group: 64"
    if form.grid == "float8_e4m3" and layer.rank and layer.branch == "integer":
        return "a low-rank branch that reads FP8 numbers has no kernel; set branch: float"
    float8 = layer.carrier_kind.dtype == torch.float8_e4m3fn
    if float8 and capability is not None and capability < 89:
        return f"FP8 needs compute capability 8.9, this GPU has {capability // 10}.{capability % 10}; set carrier: int8"
    return None


class FastInput(nn.Module):
    """What a linear does to its input: transform and rounding, in one kernel where it has a form of the transform.

    keep: whether the transformed input is wanted as well.

    Raises:
        ValueError: an input that no kernel can take.
    """

    def __init__(self, layer: QuantLinear, plans: dict[str, Online], keep: bool) -> None:
        super().__init__()
        self.width, self.keep = layer.in_features, keep
        device = layer.codes.device
        self.transform: InputTransform | None = None if layer.transform is None else on_device(layer.transform, device)
        self.plan: Online | None = None
        if layer.activation.granularity == "none":
            return
        made = online(layer.transform, layer.activation, layer.activation_scale, self.width)
        if made is not None:
            self.transform = None
        else:
            made = online(None, layer.activation, layer.activation_scale, self.width)
        if made is None:
            raise ValueError(f"{layer.site}: {self.width} channels are too many for a kernel")
        made = made.to(device)
        self.plan = plans.setdefault(made.fingerprint(), made)

    def _apply(self, fn: Any, recurse: bool = True) -> FastInput:
        return self  # tensors keep their dtypes, and lie where the kernels want them

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """x [.., K] -> (what a product reads [M, K], its scales, the transformed input [M, K] where it is kept)."""
        if self.transform is not None:
            x = self.transform(x.float())
        if self.plan is None:
            q = x.reshape(-1, self.width).to(torch.bfloat16)
            return q, None, q
        return quantized_input(x, self.plan, self.keep)


class FastLinear(nn.Module):
    """y = x W^T + b through the kernels, made from a QuantLinear on the device that this is on, where it stays.

    plans: those of the layers made before; a layer that reads its input in the same form takes the same one, so that the
    traced graph shows what can be shared. decoded: a weight that quantized inputs are multiplied by lies in 8 bits, so that no
    call decodes it. One for inputs in floating point stays as coded: it would be written out in bfloat16, or is read by few
    tokens, whose time is that of its bytes.

    Raises:
        ValueError: a layer that no kernel can run (`why_no_kernel`).
    """

    def __init__(self, layer: QuantLinear, plans: dict[str, Online] | None = None, decoded: bool = False) -> None:
        super().__init__()
        if reason := why_no_kernel(layer):
            raise ValueError(f"{layer.site}: {reason}")
        self.site, self.form = layer.site, layer.activation
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.stored = _stored(layer, decoded and layer.activation.granularity != "none")
        # The vendor's FP8 product adds a bias of bfloat16, which would be rounded anew at each call.
        self.bias = layer.bias.to(torch.bfloat16) if layer.bias is not None and self.stored.float8 else layer.bias
        branch = layer.low_rank()
        self.up = None if branch is None else branch.up.to(torch.bfloat16)  # int8 numbers, exact
        self.down: Tensor | None = None
        self.down_stored: StoredWeight | None = None
        if branch is not None and (self.form.granularity == "none" or layer.branch == "float"):
            self.down = (branch.down * branch.scale[:, None]).to(torch.bfloat16)
        elif branch is not None:
            self.down_stored = store_carrier(branch.down, branch.scale)
        self.input = FastInput(layer, {} if plans is None else plans, keep=self.down is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> FastLinear:
        return self  # as FastInput

    def extra_repr(self) -> str:
        activation = "a16" if self.form.granularity == "none" else f"a{self.form.bits}"
        return f"{self.in_features} -> {self.out_features}, w{self.stored.bits}{activation}"

    def forward(self, x: Tensor) -> Tensor:
        shape, dtype = (*x.shape[:-1], self.out_features), x.dtype
        q, scales, kept = self.input(x)
        added = None
        if self.up is not None:
            if self.down_stored is not None:
                inner = stored_product(q, scales, self.down_stored, None, None, torch.bfloat16)
            else:
                inner = F.linear(kept.to(torch.bfloat16), self.down)  # type: ignore[arg-type]
            added = F.linear(inner, self.up)
        return stored_product(q, scales, self.stored, self.bias, added, dtype).view(shape)


def _stored(layer: QuantLinear, decoded: bool) -> StoredWeight:
    if layer.bits == 8:
        return store_carrier(layer.codes, layer.scale)
    code = layer.code()
    return store_carrier(code.carrier(), code.scale.float()) if decoded else store(code)


def on_device(transform: InputTransform, device: torch.device) -> InputTransform:
    """The same transform with all that it multiplies by in float32 there, so that no call copies anything."""
    rotations = []
    for start, stop, rotation in transform.rotations:
        steps = [
            replace(step, index=step.index.to(device)) if isinstance(step, PermuteStep)
            else replace(step, matrix=step.matrix.to(device, torch.float32))
            for step in rotation.steps
        ]  # fmt: skip
        rotations.append((start, stop, replace(rotation, steps=tuple(steps))))
    return InputTransform(transform.inverse_scale, transform.shift, rotations).to(device)


def quantized_input(x: Tensor, plan: Online, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`ditq::quantized` of what a plan says, with nothing before it."""
    form = plan.form
    return quantized(
        x, None, None, plan.inverse_scale, plan.shift, plan.first, plan.second, plan.calibrated, False, 0.0, "", plan.a, plan.b,
        plan.size, plan.start, plan.stop, form.bits, form.granularity, form.grid, plan.limits, form.group_size, keep,
    )  # fmt: skip


def stored_product(
    x: Tensor,
    x_scale: Tensor | None,
    stored: StoredWeight,
    bias: Tensor | None,
    added: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`ditq::product` of a stored weight."""
    return product(
        x, x_scale, stored.data, stored.tables, stored.multiplier, stored.scale, bias, added, stored.rows, stored.columns,
        stored.bits, stored.run, stored.group, stored.float8, "", dtype,
    )  # fmt: skip
