"""rotate: spread outliers over channels by an orthogonal matrix, offline where it is exact and online where it must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.formats import BitFormat
from ditq.graph import DiTGraph
from ditq.nn.transformed_linear import TransformedLinear
from ditq.numerics.codebook import encode, fit_uniform
from ditq.numerics.rotation import (
    Rotation,
    block_hadamard_rotation,
    hadamard_rotation,
    head_rotation,
    outlier_rotation,
)
from ditq.numerics.uniform import quantize_per_token
from ditq.parts import Attention, InputGroup
from ditq.passes.base import Context, Pass, PassReport, register, relative_error, setting
from ditq.passes.folding import fold_through_attention, plain_linear, rotate_consumers

# From cheapest to dearest at run time: a search keeps the first that is as good as the best.
# Each makes its matrix of (sampled rows, largest block, seed).
KINDS: dict[str, Callable[[Tensor, int, int], Rotation | None]] = {
    "identity": lambda sample, block, seed: None,
    "block_hadamard": lambda sample, block, seed: block_hadamard_rotation(
        sample.shape[1], math.gcd(sample.shape[1], block), seed
    ),
    "hadamard": lambda sample, block, seed: hadamard_rotation(sample.shape[1], seed=seed),
    "outlier": lambda sample, block, seed: outlier_rotation(sample, seed=seed),
}


@register
@dataclass(frozen=True)
class Rotate(Pass):
    """x -> x R and W -> W R, which leaves x W^T as it is.

    Heads' values are rotated offline: R goes into the value linears and out of the attention's output linears. Inputs that
    follow a modulation or an activation are rotated online. Which matrix an input gets:

    - `literal`: the rule of LRQ-DiT (eq. 11-12): RMS below `threshold` -> Hadamard, else the two-step outlier-aware rotation;
    - `quantile`: the `quantile` of the inputs with the largest RMS get the outlier-aware rotation, the others Hadamard;
    - `search`: the kind of `kinds` with the least output error under `format` on held-out rows; a cheaper kind wins if it is
      within `tolerance` of the best;
    - one of the kinds by name, for every input.

    Source: QuaRot (Ashkboos 2024); LRQ-DiT (2025); DuQuant (Lin 2024) for the outlier-aware form. Every width is built from
    Paley and Sylvester matrices with random signs.

    Example:
        - rotate: {mode: search, format: w4a8}
    """

    name: ClassVar[str] = "rotate"
    not_after: ClassVar[tuple[str, ...]] = ("quantize",)
    mode: str = setting("search", "how the matrix is chosen", ("literal", "quantile", "search", *KINDS))
    kinds: list[str] = setting(["identity", "block_hadamard", "hadamard"], "what `search` may choose from")
    block: int = setting(
        64, "channels that a block Hadamard mixes; else the largest power of two that divides the width"
    )
    online: bool = setting(True, "rotate inputs at run time; false keeps to the offline rotation of values")
    values: bool = setting(True, "rotate the heads' values offline")
    format: str = setting("w4a8", "the format that `search` judges by")
    threshold: float = setting(1.0, "RMS at which `literal` changes to the outlier-aware rotation")
    quantile: float = setting(0.05, "share of inputs that `quantile` gives the outlier-aware rotation")
    tolerance: float = setting(0.05, "how much worse than the best a cheaper kind may be in `search`")
    select: list[str] = setting(["role:token"], "which linears; all linears of an input are rotated together")

    def check(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise DitqError(f"pass 'rotate': unknown kinds {unknown}; choose from {', '.join(KINDS)}")
        if self.block < 2 or self.block & (self.block - 1):
            raise DitqError(f"pass 'rotate': block is {self.block}, must be a power of two from 2 on, such as 32 or 64")
        if not 0 <= self.quantile <= 1:
            raise DitqError(f"pass 'rotate': quantile is {self.quantile}, must be between 0 and 1")
        if self.tolerance < 0:
            raise DitqError(f"pass 'rotate': tolerance is {self.tolerance}, must be 0 or more")
        BitFormat.parse(self.format)

    def _folded(self, graph: DiTGraph, selected: set[str]) -> list[Attention]:
        """Attentions whose values are rotated offline."""
        found = [attention for attention in graph.attentions.values() if self.values and attention.foldable]
        return [a for a in found if {*a.values, *(output.site for output in a.outputs)} <= selected]

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        selected = set(graph.select(self.select))
        folded = self._folded(graph, selected)
        said = {output.site: "rotate offline" for attention in folded for output in attention.outputs}
        covered = {o.site: o.stop - o.start for attention in folded for o in attention.outputs}
        for group in graph.groups.values():
            if self.online and self.mode != "identity" and set(group.sites) <= selected:
                for site in group.sites:
                    if covered.get(site, 0) < group.width:
                        said[site] = f"rotate {self.mode}"
        return said

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        selected = set(graph.select(self.select))
        report.rows.extend(self._rotate_values(graph, context, selected))
        if self.online:
            groups = [group for group in graph.groups.values() if set(group.sites) <= selected]
            flagged = self._flagged(groups, context)
            for group in context.track(self.name, groups):
                report.rows.extend(self._rotate_group(graph, context, group, group.name in flagged))
        kinds = [row["kind"] for row in report.rows]
        report.summary = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        products = sum(site.macs for site in graph.sites.values())
        report.summary["online cost, % of multiply-adds"] = 100 * online_cost(graph) / products
        return report

    def _rotate_values(self, graph: DiTGraph, context: Context, selected: set[str]) -> list[dict[str, Any]]:
        rows = []
        for attention in self._folded(graph, selected):
            width = attention.heads * attention.head_width
            rotation = head_rotation(width, attention.head_width, seed=context.seed)
            one_head = head_rotation(attention.head_width, attention.head_width, seed=context.seed)
            fold_through_attention(graph, attention, one_head)
            for output in attention.outputs:
                group = graph.sites[output.site].group
                context.change(group).rotations.append((output.start, output.stop, rotation))
                rows.append({"input": group, "channels": f"{output.start}:{output.stop}", "kind": "offline"})
        return rows

    def _flagged(self, groups: list[InputGroup], context: Context) -> set[str]:
        """Inputs that the RMS rule gives the outlier-aware rotation."""
        if self.mode not in ("literal", "quantile"):
            return set()
        rms = {group.name: float(context.statistics(group.name).rms()) for group in groups}
        if self.mode == "literal":
            return {name for name, value in rms.items() if value >= self.threshold}
        ordered = sorted(rms, key=lambda name: rms[name], reverse=True)
        return set(ordered[: round(self.quantile * len(ordered))])

    def _rotate_group(
        self, graph: DiTGraph, context: Context, group: InputGroup, flagged: bool
    ) -> list[dict[str, Any]]:
        rows = []
        change = context.change(group.name)
        for start, stop in _free_ranges(group.width, [part[:2] for part in change.rotations]):
            statistics = context.statistics(group.name)
            sample = statistics.sample[:, start:stop]
            weight = torch.cat([plain_linear(graph, site).weight[:, start:stop] for site in group.sites])
            if self.mode == "search":
                kind, rotation, error = self._search(sample, weight.float(), context.seed)
            else:
                kind = ("outlier" if flagged else "hadamard") if self.mode in ("literal", "quantile") else self.mode
                rotation, error = KINDS[kind](sample, self.block, context.seed), {}
            row = {"input": group.name, "channels": f"{start}:{stop}", "kind": kind, "rms": float(statistics.rms())}
            rows.append({**row, **{f"error {name}": value for name, value in error.items()}})
            if rotation is None:
                continue
            rotate_consumers(graph, group.sites, start, stop, rotation)
            change.rotations.append((start, stop, rotation))
            change.online.append((start, stop, rotation))
        if change.online:
            for site in group.sites:
                graph.replace(site, TransformedLinear(plain_linear(graph, site), change.transform()))
        return rows

    def _search(self, sample: Tensor, weight: Tensor, seed: int) -> tuple[str, Rotation | None, dict[str, float]]:
        """The cheapest kind whose quantized output error on held-out rows is within `tolerance` of the least."""
        fitted, held_out = sample[::2], sample[1::2].float()
        reference, candidates, errors = held_out @ weight.T, {}, {}
        for kind in self.kinds:
            rotation = KINDS[kind](fitted, self.block, seed)
            candidates[kind] = rotation
            x = held_out if rotation is None else rotation.apply(held_out)
            w = weight if rotation is None else rotation.right_multiply(weight.double()).float()
            errors[kind] = relative_error(reference, self._quantized_product(x, w))
        limit = min(errors.values()) * (1 + self.tolerance)
        chosen = next(kind for kind in KINDS if kind in errors and errors[kind] <= limit)
        return chosen, candidates[chosen], errors

    def _quantized_product(self, x: Tensor, weight: Tensor) -> Tensor:
        form = BitFormat.parse(self.format)
        weight = encode(weight, fit_uniform(weight, form.weight)).decode()
        if form.activation < 16:
            q, step = quantize_per_token(x, form.activation)
            x = q * step
        return x @ weight.T


def _free_ranges(width: int, taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The channel ranges of [0, width) that no rotation covers yet."""
    free, end = [], 0
    for start, stop in sorted(taken):
        if start > end:
            free.append((end, start))
        end = max(end, stop)
    return [*free, (end, width)] if end < width else free


def online_cost(graph: DiTGraph) -> int:
    """Multiply-adds that online rotations add to one forward of one sample; shared inputs are counted once."""
    counted = 0
    for group in graph.groups.values():
        module = graph.linear(group.sites[0])
        transform = getattr(module, "transform", None)
        if transform is not None:
            counted += graph.sites[group.sites[0]].tokens * transform.multiply_adds()
    return counted
