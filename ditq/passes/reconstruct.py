"""reconstruct: learn codes, levels, scales and biases of a block's linears against the block's own output."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ditq.calibration.batches import CallBatch, sampled_batches
from ditq.calibration.record import Trajectories
from ditq.calibration.sampler import LATENTS, Sampler, find_sampler
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.learned_linear import LearnedLinear
from ditq.nn.quant_linear import QuantLinear
from ditq.nn.structural.ordered_tokens import ordered_tokens
from ditq.nn.structural.parallel_block import paired
from ditq.nn.structural.scheduled_block import scheduled_blocks
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.block_records import BlockOutputs, Call, block_inputs, record_outputs, tensors_of
from ditq.passes.guided_error import guidance_of, squared, told

SCOPES = ("auto", "model", "block")
BYTES_A_WEIGHT = 16  # a latent value, its gradient and Adam's two moments in float32
FIGURES = "figures"  # name of the errors before and after among the tensors that are kept of a finished unit
HELD_OUT = 8  # every eighth batch judges what was learned on the others


@dataclass(frozen=True, eq=False)
class _Example:
    """One batch of a block: what it gets, what the original block gave, and how much each sample counts [B].

    guidance: for each step in the batch what guidance makes of its branches, [S, B / S]; None where errors count alone.
    """

    inputs: Call
    wanted: list[Tensor]
    weights: Tensor
    guidance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What one pass of the recipe took from the original model: which modules it learns, and what they gave for each batch.

    number: of the passes of this name in the recipe, from 1.
    """

    number: int
    units: list[str]
    batches: list[CallBatch]
    outputs: BlockOutputs
    sampler: Sampler | None


@register
@dataclass(frozen=True)
class Reconstruct(Pass):
    """After `quantize`: gradient descent on codes, levels, scales and biases, of all the model or block after block.

    With `scope: model` all linears learn at once what the original denoiser gives along recorded trajectories. With
    `scope: block`, for models whose gradients do not fit in memory, a block gets what the compressed blocks before it give
    and learns what the original gave in its place, so that it also makes up for what went wrong before it. Held-out calls
    decide whether what was learned is kept; it is never worse on them than before.

    Where the model is learned as a whole and the sampler joins guidance branches, u + g (c - u), the error that counts is the
    one of what they are joined to: an error that is alike in both branches costs little, one of their difference g^2.

    Source: block reconstruction, BRECQ (Li et al., arXiv 2102.05426), with all parameters learned as in EfficientQAT
    (Chen et al., arXiv 2407.11062).

    Example:
        - quantize: {format: w3a8}
        - reconstruct: {steps: 200}
    """

    name: ClassVar[str] = "reconstruct"
    only_after: ClassVar[tuple[str, ...]] = ("quantize",)
    wants_weights: ClassVar[bool] = True
    scope: str = setting(
        "auto",
        "what is learned at a time: the model, each block, or the model where `memory` and `select` allow",
        SCOPES,
    )
    memory: float = setting(
        4.0, "`scope: auto`: GB for weights, gradients and moments of the whole model; else by block"
    )
    steps: int = setting(200, "steps of gradient descent, for each block or for the model")
    samples: int = setting(256, "recorded denoiser calls that are learned from and judged by")
    batch: int = setting(8, "samples a step")
    rate: float = setting(0.008, "learning rate at the start, in steps between two levels of the weights")
    guided: bool = setting(True, "`scope: model`: the error that counts is that of the branches as guidance joins them")
    step_weights: str = setting("none", "samples count by their step's effect on the last latents", ("none", "effect"))
    select: list[str] = setting(["*"], "which blocks, as patterns of their names; all with `scope: model`")

    def check(self) -> None:
        for key, least in (("steps", 1), ("batch", 1), ("samples", 2)):
            if getattr(self, key) < least:
                raise DitqError(f"pass 'reconstruct': {key} is {getattr(self, key)}, must be {least} or more")
        if self.scope == "model" and self.select != ["*"]:
            raise DitqError("pass 'reconstruct': select is of blocks, and scope: model learns all; set scope: block")
        if self.samples < 2 * self.batch:
            raise DitqError(
                f"pass 'reconstruct': samples is {self.samples}, must be at least two batches of {self.batch}"
            )
        for key in ("rate", "memory"):
            if getattr(self, key) <= 0:
                raise DitqError(f"pass 'reconstruct': {key} is {getattr(self, key)}, must be above 0")

    def _units(self, graph: DiTGraph) -> list[str]:
        """Modules that are learned, by name; "" is the model."""
        for pattern in self.select:
            if not fnmatch.filter(graph.blocks, pattern):
                raise DitqError(
                    f"pass 'reconstruct': {pattern!r} matches no block; there are {', '.join(graph.blocks)}"
                )
        chosen = [name for name in graph.blocks if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.select)]
        weights = sum(site.parameters for site in graph.sites.values() if site.role != "unused")
        fits = BYTES_A_WEIGHT * weights <= self.memory * 1e9 and len(chosen) == len(graph.blocks)
        return [""] if self.scope == "model" or (self.scope == "auto" and fits) else chosen

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        units = _comparable(graph.model, self._units(graph))
        blocks = graph.blocks if units == [""] else units
        sites = [site for name in blocks for site in graph.blocks[name].sites]
        return dict.fromkeys(sites, f"learn {self.steps} steps")

    def check_recorded(self, trajectories: Trajectories, seed: int) -> None:
        self._batches(trajectories, seed)

    def _batches(self, trajectories: Trajectories, seed: int) -> list[CallBatch]:
        batches = sampled_batches(trajectories, self.samples, self.batch, seed)
        if len(batches) < 2:
            raise DitqError(
                f"pass 'reconstruct': all recorded calls fit one batch of {self.batch}, and nothing is left to judge what is "
                "learned on it; set batch lower, or calibrate with more prompts or steps"
            )
        return batches

    def prepare(self, graph: DiTGraph, context: Context) -> None:
        """What the original model gives on the sampled calls, before any pass changes it."""
        trajectories = context.trajectories()
        batches = self._batches(trajectories, context.seed)
        outputs, units = BlockOutputs(), self._units(graph)
        for number, batch in context.track("original blocks", list(enumerate(batches))):
            record_outputs(graph.model, units, number, batch, outputs)
        sampler = find_sampler(graph.model, trajectories) if self.guided and units == [""] else None
        waiting: list[_Prepared] = context.prepared.setdefault(self.name, [])
        waiting.append(_Prepared(len(waiting) + 1, units, batches, outputs, sampler))

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        prepared: _Prepared = context.prepared[self.name].pop(0)  # passes run in the order in which they prepared
        units = _comparable(graph.model, prepared.units)
        for unit in context.track(self.name, units):
            layers = _layers(graph.model, unit, context)
            if not layers:
                continue
            first = next(iter(layers.values()))

            def learn(unit: str = unit, layers: dict[str, QuantLinear] = layers) -> dict[str, Tensor]:
                figures = self._learn(graph, unit, layers, prepared, context)
                return {**_state(layers), FIGURES: torch.tensor(figures, dtype=torch.float64)}

            found = context.cached_tensors(f"{self.name}.{prepared.number}.{unit or 'model'}", learn)
            _restore(layers, found)
            before, after = found[FIGURES].tolist()
            row = {"error before": before, "error after": min(before, after), "kept": after < before}
            report.rows.append({"block": unit or "the model", "linears": len(layers), "first": first.site, **row})
        # a block that loses nothing, as one behind a gate that is shut, keeps what it has
        shares = ((row["error after"], row["error before"]) for row in report.rows)
        kept: list[float] = [after / before if before else 1.0 for after, before in shares]
        if kept:
            if self.guided and units == [""]:
                report.summary["branches joined as"] = told(prepared.sampler)
            report.summary |= {"blocks": len(report.rows), "mean share of the error left": sum(kept) / len(kept)}
        return report

    def _learn(
        self,
        graph: DiTGraph,
        unit: str,
        layers: dict[str, QuantLinear],
        prepared: _Prepared,
        context: Context,
    ) -> tuple[float, float]:
        """Change the layers of one unit; the relative errors before and after, on held-out calls. A change that does not
        lower the error is undone.
        """
        inputs = block_inputs(graph.model, unit, prepared.batches)
        examples = [
            _Example(
                given,
                prepared.outputs.get(unit, number),
                context.step_weights(batch.steps, self.step_weights),
                guidance_of(batch, prepared.sampler),
            )
            for number, (batch, given) in enumerate(zip(prepared.batches, inputs, strict=True))
        ]
        judges, lessons = examples[::HELD_OUT], [e for i, e in enumerate(examples) if i % HELD_OUT]
        module = graph.model.get_submodule(unit)
        before, untouched = _error(module, judges), _state(layers)
        learned = {site: LearnedLinear(layer, context.weights[site]) for site, layer in layers.items()}
        for site, layer in learned.items():
            graph.replace(site, layer)
        try:
            with torch.enable_grad():
                self._descend(module, list(learned.values()), lessons, context)
        finally:
            for site, quantized in layers.items():
                graph.replace(site, quantized)
        for site, quantized in layers.items():
            quantized.recode(learned[site].code(), learned[site].bias.detach())
        after = _error(module, judges)
        if not after < before:
            _restore(layers, untouched)
        return before, after

    def _descend(
        self, module: nn.Module, learned: list[LearnedLinear], lessons: Sequence[_Example], context: Context
    ) -> None:
        groups = [group for layer in learned for group in layer.parameter_groups(self.rate)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        )
        energy = sum(float(_energy(example)) for example in lessons) / len(lessons)
        order: list[int] = []
        generator = torch.Generator().manual_seed(context.seed)
        for _ in context.track("learning", range(self.steps)):
            if not order:
                order = torch.randperm(len(lessons), generator=generator).tolist()
            loss = _loss(module, lessons[order.pop()]) / energy
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()


def _comparable(model: nn.Module, units: list[str]) -> list[str]:
    """Those of the modules whose outputs in the present model are to be what they were in the original.

    Raises:
        DitqError: blocks that cannot be run or compared alone.
    """
    if units == [""]:
        return units
    reason = ""
    scheduled = {name: part for name, part in scheduled_blocks(model).items() if name in units}
    if paired(model):
        reason = "a block that runs beside another, by parallel_blocks, cannot be learned alone"
    elif ordered_tokens(model) is not None:
        reason = "blocks between which token_order has moved the tokens cannot be compared with the original's"
    elif any(len(part.runs) > 1 for part in scheduled.values()):
        reason = "a block that runs at some timesteps only, by mob, cannot be learned alone"
    if reason:
        raise DitqError(f"pass 'reconstruct': {reason}; set scope: model")
    return [name for name in units if name not in scheduled or scheduled[name].compared]


def _layers(model: nn.Module, unit: str, context: Context) -> dict[str, QuantLinear]:
    """The quantized linears inside the unit that have codes to learn."""
    found = {}
    for module in model.get_submodule(unit).modules():
        if isinstance(module, QuantLinear) and module.bits < 8 and module.site in context.weights:
            if module.activation.granularity == "timestep":
                raise DitqError(
                    f"pass 'reconstruct': {module.site} has a scale a timestep bin, but calls of all steps "
                    "are learned together; set activation: token or tensor, or leave its block out of select"
                )
            found[module.site] = module
    return found


def _loss(module: nn.Module, example: _Example) -> Tensor:
    """Sum over the outputs of the weighted squared distance to what the original gave."""
    arguments, keywords = example.inputs
    given = tensors_of(module(*arguments, **keywords))
    return _weighted([a - b for a, b in zip(given, example.wanted, strict=True)], example)


def _energy(example: _Example) -> Tensor:
    return _weighted(example.wanted, example)


def _weighted(tensors: Sequence[Tensor], example: _Example) -> Tensor:
    """sum_b w_b ||values_b||^2, or of the branches as guidance joins them and a little of each alone."""
    latents = None if example.guidance is None else example.inputs[1][LATENTS]
    return squared(tensors, example.weights, example.guidance, latents)


@torch.no_grad()
def _error(module: nn.Module, examples: Sequence[_Example]) -> float:
    """Weighted squared error of the module's outputs relative to what the original gave."""
    lost = sum(float(_loss(module, example)) for example in examples)
    return lost / max(sum(float(_energy(example)) for example in examples), 1e-30)


def _state(layers: dict[str, QuantLinear]) -> dict[str, Tensor]:
    """What learning may change of the layers."""
    return {
        f"{site}.{name}": buffer.clone()
        for site, layer in layers.items()
        for name, buffer in layer.state_dict().items()
        if name in ("codes", "table", "scale", "bias")
    }


def _restore(layers: dict[str, QuantLinear], state: dict[str, Tensor]) -> None:
    for site, layer in layers.items():
        bias = state.get(f"{site}.bias")
        layer.codes, layer.table, layer.scale = (state[f"{site}.{name}"] for name in ("codes", "table", "scale"))
        layer.bias = bias
        layer.forget()
