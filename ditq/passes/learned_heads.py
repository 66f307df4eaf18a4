"""Learning the rotation of the heads' values: free at run time, since it lies in the weights on both sides of attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ditq.graph import DiTGraph
from ditq.numerics.learned_rotation import refine
from ditq.numerics.rotation import BlockStep, HeadsStep, Rotation, block_hadamard_rotation, head_rotation
from ditq.parts import Attention
from ditq.passes.base import Context
from ditq.passes.folding import plain_linear
from ditq.passes.judging import FakeQuantLoss, Judge, Trial, choose


class ValueLoss(FakeQuantLoss):
    """Output error of a value linear whose rows become R^T W_v before they are quantized, over that of its output."""

    def __call__(self, rotation: Rotation) -> Tensor:
        weight = self._weight(rotation.apply(self.trial.weight.T).T, lambda: self.trial.moment)
        wanted = rotation.apply(self.reference)
        return (wanted - self._input(self.trial.rows) @ weight.T).square().sum() / self.energy

    def held_out_errors(self, trial: Trial, rotation: Rotation) -> Tensor:
        turned = replace(trial, weight=rotation.apply(trial.weight.T).T.contiguous())
        return self.judge.errors(turned, rotation.apply(trial.output()))


def learned_heads(
    graph: DiTGraph, context: Context, attention: Attention, judge: Judge, steps: int
) -> tuple[Rotation, Tensor, dict[str, Any]]:
    """(the rotation of all heads' channels, its matrices [heads, d, d] or [d, d], what the report says of it: which was taken,
    errors before and after).

    Starts from the Hadamard rotation, the same for every head, and lets each head go its own way; where the values have fewer
    heads than the outputs (grouped queries), all heads keep one matrix. The loss is the relative output error of the
    linears that read the attention, plus that of the value linears, whose rows R^T W_v are quantized too. What was learned is
    taken only if the sum is less on held-out rows by more than their noise.
    """
    width, size = attention.heads * attention.head_width, attention.head_width
    matrix = head_rotation(size, size, seed=context.seed).matrix()
    start = Rotation(width, (BlockStep(matrix),))
    values = [site for site in attention.values if plain_linear(graph, site).out_features == width]
    if len(values) == len(attention.values):
        start = Rotation(width, (HeadsStep(matrix.repeat(attention.heads, 1, 1)),))
    losses: list[tuple[FakeQuantLoss, Trial]] = []
    for output in attention.outputs:
        weight = plain_linear(graph, output.site).weight
        statistics = context.statistics(graph.sites[output.site].group)
        learned_on, held_out = Trial.of(statistics, [weight], slice(output.start, output.stop)).halves()
        losses.append((FakeQuantLoss(judge, learned_on), held_out))
    for site in values:
        group = graph.groups[graph.sites[site].group]
        trial = Trial.of(context.statistics(group.name), [plain_linear(graph, site).weight], most_outputs=width)
        block = math.gcd(group.width, 64)  # its input will be rotated; how, is not known yet
        trial = trial.rotated(block_hadamard_rotation(group.width, block, context.seed) if block > 1 else None)
        learned_on, held_out = trial.halves()
        losses.append((ValueLoss(judge, learned_on), held_out))
    learned, _, _ = refine(start, lambda rotation: torch.stack([loss(rotation) for loss, _ in losses]).sum(), steps)
    errors = {}
    for name, rotation in (("hadamard", start), ("learned", learned)):
        found = [loss.held_out_errors(held_out, rotation) for loss, held_out in losses]
        errors[name] = torch.stack([part[: min(map(len, found))] for part in found]).sum(0)
    better = choose(errors, 0.0) == "learned"
    taken = learned if better else start
    (step,) = taken.steps
    assert isinstance(step, (BlockStep, HeadsStep))
    measured = {f"error {name}": float(found.mean()) for name, found in errors.items()}
    return taken, step.matrix, {"kind": "offline learned" if better else "offline", **measured}
