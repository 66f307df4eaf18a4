"""A QuantLinear whose codes, levels, scales and bias can be learned by gradient descent: what `reconstruct` trains.

Every weight has a latent value u in steps of its row's scale; its code is the level nearest to u. Gradients pass the roundings
straight through (Bengio et al., arXiv 1308.3432), as in block-wise training of all parameters (EfficientQAT, Chen et
al., arXiv 2407.11062):

    c = table[argmin_k |u - table_k|],   w = s f c,   dw/du := s,   dw/df and dw/dtable as they are
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.nn.quant_linear import QuantLinear
from ditq.numerics.carrier import E4M3, carrier_of
from ditq.numerics.weight_code import SMALLEST_SCALE, WeightCode, midpoints

# How far towards the edge of its code's cell a latent value may start: nearer to it, the noise of single steps flips codes.
_WITHIN = 0.4


class LearnedLinear(nn.Module):
    """Stands in a QuantLinear's place while it is learned; at the start it computes the same.

    Args:
        layer: coded in 2 to 7 bits.
        weight: [O, I] that the layer stands for, before it was coded, in the basis of the transformed input.
    """

    def __init__(self, layer: QuantLinear, weight: Tensor) -> None:
        super().__init__()
        self.layer, code = [layer], layer.code()  # in a list: what is frozen is no submodule
        branch = layer.low_rank()
        target = weight.float() if branch is None else weight.float() - branch.product()
        self.bits, self.scale, self.multiplier = code.bits, code.scale, code.multiplier
        groups = 1 if code.multiplier is None else code.multiplier.shape[1]
        self.groups = max(groups, code.scale.shape[1] if code.scale.dim() == 2 else 1)
        self.carrier = carrier_of(code.table)
        self.table = nn.Parameter(code.table.float())
        self.largest = self.carrier.largest(self.bits)
        self.smallest = min(
            -self.largest, float(code.table.float().min())
        )  # grids that are not symmetric reach further
        self.factor = nn.Parameter(torch.ones_like(code.scale))
        self.bias = nn.Parameter(torch.zeros(layer.out_features) if layer.bias is None else layer.bias.clone())
        self.latent = nn.Parameter(self._start(code, target))
        self.branch = None if branch is None else branch.product()

    def _start(self, code: WeightCode, target: Tensor) -> Tensor:
        """The value nearest to the target within the cell of each weight's code: float32 [O, I]."""
        levels = self._levels(code.table.float())
        middle = midpoints(levels)
        low = torch.cat((middle[..., :1] - levels.diff(dim=-1)[..., :1], middle), dim=-1)
        high = torch.cat((middle, middle[..., -1:] + levels.diff(dim=-1)[..., -1:]), dim=-1)
        centre, below, above = (self._pick(edges, code.codes) for edges in (levels, low, high))
        wanted = target / self._spread(code.scale)
        return centre + (wanted.clamp(below, above) - centre) * _WITHIN

    def _spread(self, scale: Tensor) -> Tensor:
        """Scales [O] or [O, G] for every weight: [O, 1] or [O, I]."""
        if scale.dim() == 1 or scale.shape[1] == 1:
            return scale.view(-1, 1)
        return scale.repeat_interleave(self.layer[0].in_features // scale.shape[1], dim=1)

    def _levels(self, table: Tensor) -> Tensor:
        """Carriers that the codes stand for: [1 or O, 1 or G, L]."""
        table = table[None, None] if table.dim() == 1 else table[:, None]
        if self.multiplier is None:
            return table
        if self.multiplier.dtype == E4M3:
            return table * self.multiplier.float()[:, :, None]
        exact = table * self.multiplier.float()[:, :, None] / 255
        return exact + (self.carrier.nearest(exact.detach()) - exact).detach()

    def _pick(self, levels: Tensor, codes: Tensor) -> Tensor:
        """levels [1 or O, 1 or G, L] at codes [O, I]: [O, I]."""
        if levels.shape[:2] == (1, 1):
            return levels[0, 0][codes.long()]
        groups = levels.shape[1]
        index = codes.long().unflatten(1, (groups, -1))
        return levels.expand(len(codes), -1, -1).gather(2, index).flatten(1)

    def _nearest(self, levels: Tensor) -> Tensor:
        """The code of the level nearest to each latent value: int64 [O, I]."""
        middle, latent = midpoints(levels), self.latent.detach()
        if levels.shape[:2] == (1, 1):
            return torch.bucketize(latent, middle[0, 0])
        grouped = latent.unflatten(1, (levels.shape[1], -1))
        return torch.searchsorted(middle.expand(len(latent), -1, -1).contiguous(), grouped).flatten(1)

    def weight(self) -> Tensor:
        """The weight that the present codes stand for, without the branch: float32 [O, I]."""
        levels = self._levels(self.table + (self._snapped() - self.table).detach())
        carrier = self._pick(levels, self._nearest(levels.detach()))
        scale = self._spread(self.scale * self.factor)
        return carrier * scale + scale.detach() * (self.latent - self.latent.detach())

    def _snapped(self) -> Tensor:
        """The table on its carrier's grid, ascending."""
        return self.carrier.nearest(self.table.detach().clamp(self.smallest, self.largest)).sort(dim=-1).values

    def forward(self, x: Tensor) -> Tensor:
        layer, dtype = self.layer[0], x.dtype
        x = x.float() if layer.transform is None else layer.transform(x.float())
        weight = self.weight()
        rounded = x
        if layer.activation.granularity != "none":
            rounded = x + (layer.rounded(x.detach()) - x).detach()
        if self.branch is not None and (layer.branch == "integer" or rounded is x):
            weight = weight + self.branch
        y = F.linear(rounded, weight, self.bias)
        if self.branch is not None and layer.branch == "float" and rounded is not x:
            y = y + F.linear(x, self.branch)
        return y.to(dtype)

    @torch.no_grad()
    def code(self) -> WeightCode:
        """What was learned, as a code of the same form."""
        table = self._snapped()
        codes = self._nearest(self._levels(table)).to(torch.uint8)
        scale = (self.scale * self.factor).clamp_min(SMALLEST_SCALE)
        return replace(self.layer[0].code(), codes=codes, table=self.carrier.stored(table), scale=scale)

    def parameter_groups(self, rate: float) -> Iterator[dict[str, object]]:
        """Parameters for the optimizer, each with a rate in its own unit: `rate` is in steps between two levels."""
        gap = float(self.table.detach().diff(dim=-1).mean())
        yield {"params": [self.latent], "lr": rate * gap}
        yield {"params": [self.table], "lr": rate * gap * 0.25}
        yield {"params": [self.factor], "lr": rate * 0.05}
        size = float(self._spread(self.scale).mean()) * gap * self.layer[0].in_features ** 0.5
        yield {"params": [self.bias], "lr": rate * size * 0.25}
