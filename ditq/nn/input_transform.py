"""What happens online to the input of a linear before it is quantized: scale, centring, rotation.

    x' = (x * inverse_scale - shift) R,      R = blockdiag(I, R_1, I, R_2, ...)

The matching offline half, W' = (W / inverse_scale) R and b' = b + W shift / inverse_scale, is done by the passes, so that
the layer as a whole computes the same function. A part that could be folded into the modulation is simply absent here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditq.numerics.rotation import Rotation

RotatedRange = tuple[int, int, Rotation]


class InputTransform(nn.Module):
    """x [..., I] -> (x * inverse_scale - shift) with the channels [start, stop) of each rotated range rotated.

    Args:
        inverse_scale: [I] factors of the channels, or None.
        shift: [I] values subtracted after scaling, or None.
        rotations: (start, stop, rotation) with rotation.size == stop - start; the ranges must not overlap.
    """

    inverse_scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        inverse_scale: Tensor | None = None,
        shift: Tensor | None = None,
        rotations: Sequence[RotatedRange] = (),
    ) -> None:
        super().__init__()
        self.register_buffer("inverse_scale", None if inverse_scale is None else inverse_scale.float())
        self.register_buffer("shift", None if shift is None else shift.float())
        self.rotations: list[RotatedRange] = sorted(rotations, key=lambda part: part[0])
        end = 0
        for start, stop, rotation in self.rotations:
            if start < end or stop - start != rotation.size:
                raise ValueError(
                    f"rotated range [{start}, {stop}) overlaps another or does not fit size {rotation.size}"
                )
            end = stop

    @property
    def is_identity(self) -> bool:
        return self.inverse_scale is None and self.shift is None and not self.rotations

    def forward(self, x: Tensor) -> Tensor:
        if self.inverse_scale is not None:
            x = x * self.inverse_scale.to(x.dtype)
        if self.shift is not None:
            x = x - self.shift.to(x.dtype)
        if not self.rotations:
            return x
        width = x.shape[-1]
        if len(self.rotations) == 1 and self.rotations[0][:2] == (0, width):
            return self.rotations[0][2].apply(x)
        pieces, end = [], 0
        for start, stop, rotation in self.rotations:
            if start > end:
                pieces.append(x[..., end:start])
            pieces.append(rotation.apply(x[..., start:stop]))
            end = stop
        if end < width:
            pieces.append(x[..., end:])
        return torch.cat(pieces, dim=-1)

    def multiply_adds(self) -> int:
        """Multiply-adds of the online part for one token."""
        elementwise = sum(buffer.numel() for buffer in (self.inverse_scale, self.shift) if buffer is not None)
        return elementwise + sum(rotation.multiply_adds() for _, _, rotation in self.rotations)

    def spec(self) -> dict[str, Any]:
        """The JSON form. Rotations made by construction are remade from it; tensors of learned ones lie in the state."""
        rotations = [
            {"start": start, "stop": stop, "rotation": rotation.spec()[0]} for start, stop, rotation in self.rotations
        ]
        return {
            "scaled": None if self.inverse_scale is None else self.inverse_scale.numel(),
            "shifted": None if self.shift is None else self.shift.numel(),
            "rotations": rotations,
        }

    @classmethod
    def from_spec(
        cls, spec: dict[str, Any], state: dict[str, Tensor] | None = None, prefix: str = ""
    ) -> InputTransform:
        """Remake it from `spec()`; `state` holds the tensors of data-dependent rotations under `prefix`."""
        rotations = []
        for index, part in enumerate(spec["rotations"]):
            start_of_name = f"{prefix}rotations.{index}."
            tensors = {
                name[len(start_of_name) :]: tensor
                for name, tensor in (state or {}).items()
                if name.startswith(start_of_name)
            }
            rotations.append((part["start"], part["stop"], Rotation.from_spec(part["rotation"], tensors)))
        scaled, shifted = spec["scaled"], spec["shifted"]
        return cls(
            torch.ones(scaled) if scaled else None,
            torch.zeros(shifted) if shifted else None,
            rotations,
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for index, (_, _, rotation) in enumerate(self.rotations):
            for name, tensor in rotation.spec()[1].items():
                destination[f"{prefix}rotations.{index}.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {name for name in state_dict if name.startswith(f"{prefix}rotations.")}
        kept = {name: tensor for name, tensor in state_dict.items() if name not in own}
        super()._load_from_state_dict(kept, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
