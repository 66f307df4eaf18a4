"""rotate: spread outliers over channels by an orthogonal matrix, offline where it is exact and online where it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural import StructuralPart
from ditq.nn.transformed_linear import TransformedLinear
from ditq.numerics.learned_rotation import refine
from ditq.numerics.rotation import Rotation, head_block, head_rotation
from ditq.parts import Attention, InputGroup
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.choose_codebook import check_codebook
from ditq.passes.folding import fold_through_attention, plain_linear, rotate_consumers
from ditq.passes.judging import FakeQuantLoss, Judge, Trial, choose
from ditq.passes.learned_heads import learned_heads
from ditq.passes.rotation_kinds import DATA_FREE, KINDS, Making, multiply_adds

Choice = tuple[str, Rotation | None, dict[str, float]]  # kind, matrix, error of each kind tried


@register
@dataclass(frozen=True)
class Rotate(Pass):
    """x -> x R and W -> W R, which leaves x W^T as it is.

    Heads' values are rotated offline: R goes into the value linears and out of the attention's output linears. Inputs that
    follow a modulation or an activation are rotated online. Which matrix an input gets:

    - one of the kinds by name, for every input;
    - `search`: the kind of `kinds` with the least quantized output error on held-out rows, as `format`, `codebook` and
      `rounding` say; a dearer kind must be better by `tolerance` and by more than the rows' noise;
    - `learned`: the kind that `search` finds, refined by `steps` of gradient descent along orthogonal matrices (SpinQuant),
      where that helps on held-out rows; it costs at run time what that kind costs;
    - `literal`: the rule of LRQ-DiT (eq. 11-12): RMS below `threshold` -> Hadamard, else the two-step outlier-aware rotation;
    - `quantile`: the `quantile` of the inputs with the largest RMS get the outlier-aware rotation, the others Hadamard.

    What the experts of a mixture give to their output linears gets one matrix, chosen by the errors of all of them.

    Source: QuaRot (Ashkboos 2024); SpinQuant (Liu 2024); LRQ-DiT (2025); DuQuant (Lin 2024) for the outlier-aware form. Every
    width is built from Paley and Sylvester matrices with random signs, or regular ones without.

    Example:
        - rotate: {mode: search, format: w4a8}
    """

    name: ClassVar[str] = "rotate"
    exact: ClassVar[bool] = True
    not_after: ClassVar[tuple[str, ...]] = ("quantize", "rotate")
    mode: str = setting("search", "how the matrix is chosen", ("search", "learned", "literal", "quantile", *KINDS))
    kinds: list[str] = setting(
        ["identity", "block_hadamard", "hadamard"],
        "what `search` and `learned` may choose from",
        only=("mode", ("search", "learned")),
    )
    block: int = setting(
        64, "channels that a block Hadamard mixes; else the largest power of two that divides the width"
    )
    permutation: str = setting("stride", "what stands between the two steps of `outlier`", ("stride", "zigzag"))
    online: bool = setting(True, "rotate inputs at run time; false keeps to the offline rotation of values")
    values: bool = setting(True, "rotate the heads' values offline")
    heads: str = setting("hadamard", "matrix of the heads' values", ("hadamard", "learned"))
    format: str = setting("w4a8", "the format that `search` and `learned` judge by")
    codebook: str = setting("twin_log_shared", "the codebook that they judge by")
    rounding: str = setting("nearest", "the rounding that they judge by", ("nearest", "gptq"))
    steps: int = setting(50, "steps of learning")
    threshold: float = setting(
        1.0, "RMS at which `literal` changes to the outlier-aware rotation", only=("mode", ("literal",))
    )
    quantile: float = setting(
        0.05, "share of inputs that `quantile` gives the outlier-aware rotation", only=("mode", ("quantile",))
    )
    tolerance: float = setting(
        0.05, "by how much of its error a dearer kind must be better in `search`", only=("mode", ("search", "learned"))
    )
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
        if self.steps < 1:
            raise DitqError(f"pass 'rotate': steps is {self.steps}, must be 1 or more")
        check_codebook("pass 'rotate'", self.codebook, self.format)

    def _making(self, seed: int = 0) -> Making:
        return Making(self.block, self.permutation, seed)

    def _judge(self) -> Judge:
        return Judge(self.format, self.codebook, self.rounding)

    def _candidates(self) -> list[str]:
        """The kinds that an input may get."""
        if self.mode in ("search", "learned"):
            return self.kinds
        return ["hadamard", "outlier"] if self.mode in ("literal", "quantile") else [self.mode]

    def _folded(self, graph: DiTGraph, selected: set[str]) -> list[Attention]:
        """Attentions whose values are rotated offline; there is no Hadamard matrix for heads of an odd width."""
        found = [
            attention
            for attention in graph.attentions.values()
            if self.values and attention.foldable and head_block(attention.head_width) > 1
        ]
        return [a for a in found if {*a.values, *(output.site for output in a.outputs)} <= selected]

    def _online(self, graph: DiTGraph, selected: set[str]) -> Iterator[tuple[InputGroup, int, int]]:
        """Groups and channel ranges [start, stop) that are rotated online."""
        covered: dict[str, list[tuple[int, int]]] = {}
        for attention in self._folded(graph, selected):
            for output in attention.outputs:
                covered.setdefault(graph.sites[output.site].group, []).append((output.start, output.stop))
        for group in graph.groups.values():
            if self.online and set(group.sites) <= selected:
                for start, stop in _free_ranges(group.width, covered.get(group.name, [])):
                    yield group, start, stop

    def _possible(self, width: int, where: str) -> dict[str, int]:
        """The candidates that exist for a width, with their multiply-adds a token, in the order of `KINDS`; `where` it is."""
        found = {}
        for kind in sorted(self._candidates(), key=list(KINDS).index):
            try:
                found[kind] = multiply_adds(kind, width, self._making())
            except ValueError as error:
                if self.mode not in ("search", "learned"):
                    raise DitqError(
                        f"pass 'rotate': {where}: {error}; choose another mode or leave it out by select"
                    ) from error
        return found

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        selected = set(graph.select(self.select))
        said = {o.site: "rotate offline" for attention in self._folded(graph, selected) for o in attention.outputs}
        for group, start, stop in self._online(graph, selected):
            if not self._possible(stop - start, group.name):
                raise DitqError(
                    f"pass 'rotate': none of {', '.join(self.kinds)} exists for the {stop - start} channels of {group.name}; "
                    "add identity to kinds"
                )
            if self.mode != "identity":
                said |= dict.fromkeys(group.sites, f"rotate {self.mode}")
        return said

    def folds_into(self, graph: DiTGraph) -> set[str]:
        return set().union(*(attention.values for attention in self._folded(graph, set(graph.select(self.select)))))

    def runtime_cost(self, graph: DiTGraph) -> tuple[int, int]:
        least = most = 0
        for group, start, stop in self._online(graph, set(graph.select(self.select))):
            tokens, costs = graph.sites[group.sites[0]].tokens, self._possible(stop - start, group.name).values()
            least, most = least + tokens * min(costs), most + tokens * max(costs)
        return least, most

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        selected = set(graph.select(self.select))
        self._rotate_values(graph, context, selected, report.rows)
        if self.online:
            together = _together(graph, [group for group in graph.groups.values() if set(group.sites) <= selected])
            flagged = self._flagged(together, context)
            for groups in context.track(self.name, together):
                report.rows.extend(self._rotate_groups(graph, context, groups, groups[0].name in flagged))
        kinds = [row["kind"] for row in report.rows]
        report.summary = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        products = sum(site.macs for site in graph.sites.values())
        products += sum(attention.macs for attention in graph.attentions.values())
        report.summary["online cost, % of multiply-adds"] = 100 * online_cost(graph) / products
        return report

    def _rotate_values(self, graph: DiTGraph, context: Context, selected: set[str], rows: list[dict[str, Any]]) -> None:
        for attention in self._folded(graph, selected):
            for output in attention.outputs:
                online = context.change(graph.sites[output.site].group).online
                if any(start < output.stop and output.start < stop for start, stop, _ in online):
                    # The heads' matrix would come behind the online rotation, which is computed after it.
                    raise DitqError(f"pass 'rotate': {output.site} is rotated online already; leave it out of select")
            width, size = attention.heads * attention.head_width, attention.head_width
            if self.heads == "learned":
                rotation, matrices, said = learned_heads(graph, context, attention, self._judge(), self.steps)
            else:
                rotation, said = head_rotation(width, size, seed=context.seed), {"kind": "offline"}
                matrices = head_rotation(size, size, seed=context.seed).matrix()
            fold_through_attention(graph, attention, matrices)
            for output in attention.outputs:
                group = graph.sites[output.site].group
                context.change(group).rotations.append((output.start, output.stop, rotation))
                rows.append({"input": group, "channels": f"{output.start}:{output.stop}", **said})

    def _flagged(self, together: list[list[InputGroup]], context: Context) -> set[str]:
        """Inputs that the RMS rule gives the outlier-aware rotation, by the first of those that are rotated alike."""
        if self.mode not in ("literal", "quantile"):
            return set()
        rms = {
            groups[0].name: max(float(context.statistics(group.name).rms()) for group in groups) for groups in together
        }
        if self.mode == "literal":
            return {name for name, value in rms.items() if value >= self.threshold}
        ordered = sorted(rms, key=lambda name: rms[name], reverse=True)
        return set(ordered[: round(self.quantile * len(ordered))])

    def _rotate_groups(
        self, graph: DiTGraph, context: Context, groups: list[InputGroup], flagged: bool
    ) -> list[dict[str, Any]]:
        """Rotate inputs of one width alike."""
        rows = []
        changes = [context.change(group.name) for group in groups]
        for start, stop in _free_ranges(groups[0].width, [part[:2] for part in changes[0].rotations]):
            kind, rotation, errors = self._chosen(graph, context, groups, slice(start, stop), flagged)
            for group, change in zip(groups, changes, strict=True):
                rms = float(context.statistics(group.name).rms())
                row = {"input": group.name, "channels": f"{start}:{stop}", "kind": kind, "rms": rms}
                rows.append({**row, **{f"error {name}": value for name, value in errors.items()}})
                if rotation is not None:
                    rotate_consumers(graph, group.sites, start, stop, rotation)
                    change.rotations.append((start, stop, rotation))
                    change.online.append((start, stop, rotation))
        for group, change in zip(groups, changes, strict=True):
            if change.online:
                for site in group.sites:
                    graph.replace(site, TransformedLinear(plain_linear(graph, site), change.transform()))
        return rows

    def _chosen(
        self, graph: DiTGraph, context: Context, groups: list[InputGroup], channels: slice, flagged: bool
    ) -> Choice:
        if self.mode in ("search", "learned"):
            trials = []
            for group in groups:
                weights = [plain_linear(graph, site).weight for site in group.sites]
                trials.append(Trial.of(context.statistics(group.name), weights, channels))
            return self._search(trials, context.seed)
        kind = ("outlier" if flagged else "hadamard") if self.mode in ("literal", "quantile") else self.mode
        if kind in DATA_FREE:
            sample = torch.empty(0, channels.stop - channels.start)
        else:
            sample = torch.cat([context.statistics(group.name).sample[:, channels] for group in groups])
        return kind, KINDS[kind](sample, self._making(context.seed)), {}

    def _search(self, trials: list[Trial], seed: int) -> Choice:
        """The kind to take for inputs that are rotated alike, by error on rows that no kind was made from."""
        halves = [trial.halves() for trial in trials]
        judge, references = self._judge(), [held_out.output() for _, held_out in halves]

        def errors_of(rotation: Rotation | None) -> Tensor:
            pairs = zip(halves, references, strict=True)
            return torch.cat(
                [judge.errors(held_out.rotated(rotation), reference) for (_, held_out), reference in pairs]
            )

        rows = torch.cat([fitted.rows for fitted, _ in halves])
        made = {kind: KINDS[kind](rows, self._making(seed)) for kind in self._possible(rows.shape[1], "the input")}
        errors = {kind: errors_of(rotation) for kind, rotation in made.items()}
        kind = choose(errors, self.tolerance)
        if self.mode == "learned" and (start := made[kind]) is not None:
            losses = [FakeQuantLoss(judge, fitted) for fitted, _ in halves]
            learned, _, _ = refine(
                start, lambda rotation: torch.stack([loss(rotation) for loss in losses]).sum(), self.steps
            )
            made["learned"] = learned
            errors["learned"] = errors_of(learned)
            kind = choose({kind: errors[kind], "learned": errors["learned"]}, 0.0)
        return kind, made[kind], {name: float(found.mean()) for name, found in errors.items()}


def _together(graph: DiTGraph, groups: list[InputGroup]) -> list[list[InputGroup]]:
    """The groups in their order, those that a structural part wants transformed alike as one."""
    first: dict[str, str] = {}
    for place, part in graph.model.named_modules():
        if isinstance(part, StructuralPart):
            for names in part.alike():
                first |= {f"{place}.{name}": f"{place}.{names[0]}" for name in names}
    found: dict[str, list[InputGroup]] = {}
    for group in groups:
        found.setdefault(first.get(group.name, group.name), []).append(group)
    return list(found.values())


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
