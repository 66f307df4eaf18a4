"""A quantized model on a GPU: FastLinear in the place of every QuantLinear, FastMixture of experts, the rest in bfloat16, but
for parts that their model keeps in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.kernels import fp8_attention
from ditq.kernels.answered_attention import KINDS, take_off
from ditq.kernels.constants import keep_constants
from ditq.kernels.fast_experts import FastMixture
from ditq.kernels.fast_linear import FastLinear, on_device, why_no_kernel
from ditq.kernels.online import Online
from ditq.kernels.side_by_side import lay
from ditq.nn import QuantLinear, TransformedLinear
from ditq.nn.attention_rounding import AttentionRounding
from ditq.nn.float32_parts import cast
from ditq.nn.structural.experts import MixtureOfExperts
from ditq.nn.structural.token_attention import TokenAttention

DTYPE = torch.bfloat16


def check(model: nn.Module, capability: int | None = None) -> None:
    """Raise DitqError for the first part of a model that has no kernel. capability: of the GPU, 90 for 9.0, or not known."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and (reason := why_no_kernel(layer, capability)):
            raise DitqError(f"{layer.site}: target 'cuda': {reason}")
        if isinstance(layer, AttentionRounding) and (reason := fp8_attention.why_not(layer.form, capability)):
            raise DitqError(f"{layer.site}: target 'cuda': {reason}")
        if isinstance(layer, TokenAttention) and type(layer) not in KINDS:
            raise DitqError(
                f"{layer.site}: target 'cuda' has no kernel for {layer.what}; leave the pass {layer.kind} out"
            )


def to_gpu(model: nn.Module, device: torch.device, capability: int | None = None, decoded: bool = False) -> nn.Module:
    """Move `model` there, in place. decoded: as for `FastLinear`.

    Raises:
        DitqError: a part of it has no kernel.
    """
    check(model, capability)
    plans: dict[str, Online] = {}
    kinds = (QuantLinear, TransformedLinear)
    for name in [name for name, layer in model.named_modules() if isinstance(layer, kinds)]:
        layer = model.get_submodule(
            name
        )  # one by one, so that no layer is there in both forms for longer than it takes
        if isinstance(layer, QuantLinear):
            try:
                model.set_submodule(name, FastLinear(layer.to(device), plans, decoded))
            except ValueError as error:
                raise DitqError(f"target 'cuda': {error}") from error
        elif isinstance(layer, TransformedLinear):
            layer.transform = on_device(layer.transform, device)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, MixtureOfExperts):
            model.set_submodule(name, FastMixture(layer, device))
    lay(model)
    take_off(model, device)
    fp8_attention.take_off(model, device)
    keep_constants(model, device)
    return cast(model, device, DTYPE)


def separate_experts(model: nn.Module) -> str | None:
    """In one line, which experts of a model on a GPU have kernels of their own, and why; None where all are joined."""
    found = [(name, part.why_separate) for name, part in model.named_modules() if isinstance(part, FastMixture)]
    reasons = {reason: [name for name, why in found if why == reason] for _, reason in found if reason}
    if not reasons:
        return None
    said = "; ".join(f"{names[0]} ({len(names)} in all): {reason}" for reason, names in reasons.items())
    return f"experts that run one after the other instead of in one kernel: {said}"


def as_wanted(name: str, tensor: Tensor) -> Tensor:
    """An input in the dtype that the model computes in. Timesteps and positions (`..._ids`, `image_rotary_emb.0`) stay as exact
    as they are."""
    kept = name.endswith(("ids", "timestep", "timesteps")) or "rotary" in name
    exact = tensor.dim() < 2 or kept or not tensor.is_floating_point()
    return tensor if exact else tensor.to(DTYPE)
