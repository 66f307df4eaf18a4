"""How the input of a linear is quantized: a number format, and the integers that it makes of x.

    symmetric   n = round(x / s),        |n| <= q_max = 2^(b-1) - 1      q = n        x ~ q s      s = c max|x| / q_max
    midrise     n = round(x / s - 1/2),  -2^(b-1) <= n < 2^(b-1)         q = 2n + 1   x ~ q s/2    s = c max|x| / 2^(b-1)
    unsigned    n = round((x + t) / s),  0 <= n < 2^b                    q = n        x ~ q s - t  s = c max(x + t) / (2^b - 1)
    float8_e4m3 n = x / s to the next FP8 number, |n| <= 448            q = n        x ~ q s      s = c max|x| / 448
    float4_e2m1 n = b (x / (s b) to the next FP4 number), |n| <= 2688   q = n        x ~ q s      s = c max|x| / 2688

`midrise` has a level for each of the 2^b codes and none at zero (a mid-rise quantizer: Gersho and Gray, Vector Quantization
and Signal Compression, 1992, 5.3); `symmetric` leaves one code unused, which is 1 of 16 at 4 bits. Its levels
(n + 1/2) s are odd multiples of s/2, so that int8 holds them for b <= 7 and the integer kernels need not know. The clip
factor c <= 1 trades the error of the few values beyond c max|x| for a finer step of all others. `unsigned` is for inputs
that hardly go below zero, such as those behind a GELU, which is never below -0.17: t is a calibrated shift of that size,
and no code is spent on what does not occur. What -t adds to the products does not depend on the token.

`float4_e2m1` is NVFP4: a calibrated scale s of the tensor and, for each run of 16 channels of a token, a block scale b found
at run time, the FP8 number next to max|x / s| / 6. So TensorRT's dynamic quantization has it (IDynamicQuantizeLayer); the
largest block scale is 448, and 448 * 6 = 2688.

With a scale a group (Q-DiT, Chen 2024, arXiv 2406.17343) max|x| is that of each run of channels of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ditq.numerics.carrier import BLOCK, FLOAT4, FLOAT8, LARGEST_E2M1, LARGEST_E4M3
from ditq.numerics.uniform import SMALLEST_SCALE, largest_integer, steps_per_tensor, wide

Granularity = Literal["token", "group", "tensor", "timestep", "none"]
Grid = Literal["symmetric", "midrise", "unsigned", "float8_e4m3", "float4_e2m1"]
MIDRISE_BITS = 7  # the most whose odd integers fit int8


@dataclass(frozen=True)
class ActivationFormat:
    """How the input is quantized.

    granularity: 'token' scales each token by its own maximum, 'group' each run of `group_size` channels of a token by its
    own, 'tensor' uses one calibrated scale, 'timestep' one for each bin of timesteps, between `edges`, which fall. shift: t
    of an unsigned grid.

    Raises:
        ValueError: bits, grid, clip or group size out of range.
    """

    bits: int = 16
    granularity: Granularity = "none"
    grid: Grid = "symmetric"
    clip: float = 1.0
    edges: tuple[float, ...] = ()
    shift: float = 0.0
    group_size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(self.edges))  # a list, where it comes from JSON
        if self.granularity == "none":
            return
        largest_integer(self.bits)
        if self.grid == "midrise" and self.bits > MIDRISE_BITS:
            raise ValueError(f"a mid-rise grid has at most {MIDRISE_BITS} bits on an int8 carrier, not {self.bits}")
        if self.grid == "float8_e4m3" and self.bits != 8:
            raise ValueError(f"FP8 activations have 8 bits, not {self.bits}")
        if self.grid == "float4_e2m1" and (self.bits, self.granularity, self.group_size) != (4, "tensor", BLOCK):
            raise ValueError(f"FP4 activations have 4 bits, a scale of the tensor and groups of {BLOCK}")
        if self.grid == "unsigned" and self.granularity != "token":
            raise ValueError(f"unsigned activations have a scale a token, not a {self.granularity}")
        if self.granularity == "group" and self.group_size < 1:
            raise ValueError(f"activations with a scale a group need groups of 1 or more, not {self.group_size}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"the clip factor is {self.clip}, must be above 0 and at most 1")

    @property
    def maximum(self) -> int:
        """Units s from zero (from -t, unsigned) to the largest magnitude that is not clipped."""
        if self.grid == "unsigned":
            return 2**self.bits - 1
        if self.grid == "float8_e4m3":
            return int(LARGEST_E4M3)
        if self.grid == "float4_e2m1":
            return int(LARGEST_E4M3 * LARGEST_E2M1)
        return 2 ** (self.bits - 1) if self.grid == "midrise" else largest_integer(self.bits)

    @property
    def divisor(self) -> float:
        """max|x| / s = q_max / c, or 2^(b-1) / c, or for max(x + t) (2^b - 1) / c."""
        return self.maximum / self.clip

    def scale(self, absmax: Tensor) -> Tensor:
        """s for magnitudes, or x + t, up to `absmax` (any shape), at least 1e-8."""
        return (wide(absmax) / self.divisor).clamp_min(SMALLEST_SCALE)

    def scale_of(self, x: Tensor, calibrated: Tensor | None = None) -> Tensor:
        """s for x [..., C]: each token's own [..., 1]; each group's own, at each of its channels [..., C]; or the calibrated
        one (of the bin that holds, with bins).

        Raises:
            ValueError: a format that needs a calibrated scale, but none given.
        """
        if self.grid == "unsigned":
            return self.scale((wide(x) + self.shift).amax(dim=-1, keepdim=True))
        if self.granularity == "token":
            return self.scale(x.abs().amax(dim=-1, keepdim=True))
        if self.granularity == "group":
            groups = x.unflatten(-1, (-1, self.group_size))
            return self.scale(groups.abs().amax(dim=-1)).repeat_interleave(self.group_size, dim=-1)
        if calibrated is None:
            raise ValueError(f"activations with one scale a {self.granularity} need a calibrated scale")
        return calibrated

    def steps(self, x: Tensor, scale: Tensor) -> Tensor:
        """What is then rounded to n: x in steps of its grid, within the grid's range."""
        if self.grid == "midrise":
            return (wide(x) / scale - 0.5).clamp(-self.maximum, self.maximum - 1)
        if self.grid == "unsigned":
            return ((wide(x) + self.shift) / scale).clamp(0, self.maximum)
        if self.grid in ("float8_e4m3", "float4_e2m1"):
            return (wide(x) / scale).clamp(-self.maximum, self.maximum)
        return steps_per_tensor(x, scale, self.bits)

    def nearest(self, steps: Tensor) -> Tensor:
        """What `steps` gives -> n."""
        if self.grid == "float4_e2m1":
            runs, block = self._blocks(steps)
            return (FLOAT4.nearest(runs / block.where(block > 0, 1)) * block).flatten(-2)
        return FLOAT8.nearest(steps) if self.grid == "float8_e4m3" else steps.round()

    def _blocks(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Steps [..., C] of an FP4 grid -> ([..., G, 16], b [..., G, 1]: 0 where the smallest FP8 number is too large)."""
        runs = steps.unflatten(-1, (-1, self.group_size))
        return runs, FLOAT8.nearest(runs.abs().amax(dim=-1, keepdim=True) / LARGEST_E2M1)

    def block_spacing(self, steps: Tensor) -> Tensor:
        """How far apart the numbers of an FP4 grid lie around the steps [..., C]: 1/2, 1 or 2 block scales."""
        runs, block = self._blocks(steps)
        size = (runs / block.where(block > 0, 1)).abs()
        return (torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(steps.dtype) * block).flatten(-2)

    def carriers(self, rounded: Tensor) -> Tensor:
        """n -> q, in a floating dtype, which holds them exactly."""
        return 2 * rounded + 1 if self.grid == "midrise" else rounded

    def rounded_from(self, carriers: Tensor) -> Tensor:
        """q -> n, the inverse of `carriers`; not a whole number for a q that no n makes."""
        return (carriers - 1) / 2 if self.grid == "midrise" else carriers

    def unit(self, scale: Tensor) -> Tensor:
        """s -> what one unit of q stands for."""
        return scale / 2 if self.grid == "midrise" else scale

    def quantize(self, x: Tensor, calibrated: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [..., C] -> (q [..., C], what one unit of q stands for)."""
        scale = self.scale_of(x, calibrated)
        return self.carriers(self.nearest(self.steps(x, scale))), self.unit(scale)

    def rounded(self, x: Tensor, calibrated: Tensor | None = None) -> Tensor:
        """x as it is after quantization."""
        q, unit = self.quantize(x, calibrated)
        return q * unit - self.shift if self.grid == "unsigned" else q * unit


FLOAT = ActivationFormat()  # inputs that are not quantized
