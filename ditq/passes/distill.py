"""distill: train a structurally changed model back to its original on recorded calls, before anything is quantized."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ditq.calibration.batches import CallBatch, CallStream, held_out_conditions, teaching_conditions
from ditq.calibration.sampler import LATENTS
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.structural import StructuralPart
from ditq.nn.structural.scheduled_block import scheduled_blocks
from ditq.passes.base import Context, Pass, PassReport, register, setting
from ditq.passes.distill_losses import distillation_losses, regression_losses
from ditq.passes.expert_load import measure_load, summary_of
from ditq.passes.gate import HeldOutCalls, decibels, gated, held_out_calls, limit_setting
from ditq.passes.guided_error import guidance_of, squared
from ditq.passes.training import Plan, Progress, Training
from ditq.passes.watched import Watched, fitted_alone, parts_of

POINTS = 5  # times at which the held-out error is measured on the way
SHOWN = 200  # points of a loss curve in the report
WORDS = ("all", "parts", "routers")
PRECISIONS = ("auto", "float32", "bfloat16")
ROUTER = "router"  # what a part calls the module that chooses its experts


@dataclass
class DistillReport(PassReport):
    """Also the losses on the way, means of neighbouring steps, and the held-out error at some of them."""

    curves: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "curves": self.curves, "held out": self.held_out}


@register
@dataclass(frozen=True)
class Distill(Pass):
    """Behind structural passes: the changed model learns what the original gives on the recorded calls.

        L = L_out + feature sum_l w_l ||f_T^l - f_S^l||^2 + balance L_bal
        w_l = (|L_out| / |L_l|) (mean_l' ||f_T^l'|| / ||f_T^l||)     without gradient

    `L_out` is the error of the answers, of guidance branches as they are joined; `f^l` the output of block l in the original
    (T) and in the changed model (S); `L_bal` what parts ask for, such as a balanced load of experts. With `layerwise`, parts
    are first fitted alone to what stood in their place, on the inputs that it had in the original.

    Running means of the weights are what is judged, on conditions that nothing is learned from, and kept if they are better
    there than the weights before. Several such passes may follow each other, each training other parameters.

    Source: Dense2MoE (arXiv 2510.09094); the fit of single parts is Grafting's (arXiv 2506.05340).

    Example:
        - moe: {experts: 12, top: 2}
        - distill: {steps: 500, train: [parts]}
    """

    name: ClassVar[str] = "distill"
    structural: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    steps: int = setting(500, "steps of gradient descent on the model's answers")
    layerwise: int = setting(0, "steps before them in which parts are fitted alone")
    batch: int = setting(16, "samples a step and process, guidance branches among them")
    accumulate: int = setting(1, "batches whose gradients make a step")
    rate: float = setting(0.0001, "learning rate at its highest")
    layerwise_rate: float = setting(0.0005, "the same in the steps of `layerwise`", only=("layerwise", None))
    warmup: int = setting(20, "steps in which the rate grows to it")
    decay: str = setting("cosine", "the rate after that", ("cosine", "constant"))
    weight_decay: float = setting(0.0, "AdamW's, of matrices")
    clip: float = setting(1.0, "largest norm of the gradients; 0 is any")
    ema: float = setting(0.99, "decay of the running means of the weights; 0 keeps the last weights")
    feature: float = setting(1.0, "weight of the blocks' outputs; 0 leaves them out")
    balance: float = setting(0.01, "weight of what parts ask for, such as balanced loads")
    guided: bool = setting(True, "the error that counts is that of the branches as guidance joins them")
    precision: str = setting("auto", "of products while it learns; auto: bfloat16 on GPUs, else float32", PRECISIONS)
    train: list[str] | str = setting(
        ["all"], "what learns: all, parts, routers, or patterns of the names of parameters", words=WORDS
    )
    save_every: int = setting(100, "steps between checkpoints for --resume")
    limit: float | str = limit_setting()

    def check(self) -> None:
        least = {"steps": 0, "layerwise": 0, "batch": 1, "accumulate": 1, "warmup": 0, "save_every": 1,
                 "weight_decay": 0, "clip": 0, "feature": 0, "balance": 0}  # fmt: skip
        for key, smallest in least.items():
            if getattr(self, key) < smallest:
                raise DitqError(f"pass 'distill': {key} is {getattr(self, key)}, must be {smallest} or more")
        for key in ("rate", "layerwise_rate"):
            if getattr(self, key) <= 0:
                raise DitqError(f"pass 'distill': {key} is {getattr(self, key)}, must be above 0")
        if not self.steps and not self.layerwise:
            raise DitqError("pass 'distill': steps and layerwise are 0, so nothing would be learned; give one of them")
        if not 0 <= self.ema < 1:
            raise DitqError(f"pass 'distill': ema is {self.ema}, must be at least 0 and below 1")
        if not self.train:
            raise DitqError("pass 'distill': train is empty; name what learns, such as all, parts or routers")

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        held_out = held_out_calls(context)
        trajectories = context.trajectories()
        if held_out is None or not held_out_conditions(trajectories):
            raise DitqError("pass 'distill': one prompt cannot both teach and judge; calibrate with two or more")
        assert context.original is not None
        report = DistillReport(self.name, self.settings())
        number = context.prepared[self.name] = context.prepared.get(self.name, 0) + 1
        names = _chosen(graph.model, self.train)
        units = fitted_alone(graph.model, context.original) if self.layerwise else {}
        alone = [
            key for key, _ in graph.model.named_parameters() if key.startswith(tuple(f"{unit}." for unit in units))
        ]
        present = {name: graph.model.get_parameter(name).clone() for name in {*names, *alone}}
        stream = CallStream.of(trajectories, teaching_conditions(trajectories), self.batch, context.seed)
        accelerator = _accelerator()
        with _on(accelerator.device, graph.model, context.original):
            before = held_out.error(graph.model)
            report.held_out.append({"step": 0, "error, dB": decibels(before)})
            lesson = _Lesson(self, graph, context, accelerator, stream, held_out)
            with torch.enable_grad():
                if units:
                    report.summary |= lesson.parts_alone(f"{self.name}.{number}.parts", units, alone)
                if self.steps:
                    _write_down(report, lesson.end_to_end(f"{self.name}.{number}", names))
            after = _agreed(accelerator, held_out.error(graph.model))
            report.held_out.append({"step": self.steps, "error, dB": decibels(after)})
            accelerator.free_memory()
        if not after < before:
            for name, value in present.items():
                graph.model.get_parameter(name).copy_(value)
        report.summary |= {
            "error before, dB": decibels(before),
            "error after, dB": decibels(after),
            "kept": after < before,
            "parameters that learned": sum(graph.model.get_parameter(name).numel() for name in names),
        }
        loads = measure_load(graph.model, held_out.batches, context)
        report.rows = [{"feed-forward": place, **load.row()} for place, load in loads.items()]
        report.summary |= summary_of(loads)
        return gated(report, graph, context, self.limit)

    def plan(self, steps: int, rate: float) -> Plan:
        """The course of a training of so many steps."""
        return Plan(
            steps, rate, self.warmup, self.decay, self.weight_decay, self.clip, self.ema, self.accumulate, self.save_every
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Lesson:
    """Teacher, student and calls of one run of the pass."""

    settings: Distill
    graph: DiTGraph
    context: Context
    accelerator: Any
    stream: CallStream
    held_out: HeldOutCalls

    @property
    def teacher(self) -> nn.Module:
        assert self.context.original is not None
        return self.context.original

    def products(self) -> AbstractContextManager[object]:
        """Within it products are made in the precision that was chosen."""
        device, chosen = self.accelerator.device.type, self.settings.precision
        lower = chosen == "bfloat16" or (chosen == "auto" and device == "cuda")
        return torch.autocast(device, torch.bfloat16, enabled=lower)

    def _parts_of_batch(self, number: int) -> Iterator[tuple[CallBatch, float]]:
        """The batch of that number, on the device; its share of the samples where it could not be joined into one call."""
        batches = self.stream.batch(number)
        samples = sum(len(batch.steps) for batch in batches)
        for batch in batches:
            arguments = tree_map_only(Tensor, lambda tensor: tensor.to(self.accelerator.device), batch.arguments)
            yield CallBatch(arguments, batch.steps, batch.branches), len(batch.steps) / samples

    def parts_alone(self, name: str, units: Mapping[str, str], names: list[str]) -> dict[str, Any]:
        """Fit every part alone, on the inputs that the original's module has; what to report of it."""
        student, settings = self.graph.model, self.settings
        teacher, watched = Watched(self.teacher, list(units)), Watched(student, list(units))

        def losses(module: nn.Module, number: int) -> dict[str, Tensor]:
            told: list[dict[str, Tensor]] = []
            for batch, share in self._parts_of_batch(number):
                with self.products():
                    with torch.no_grad():
                        _, wanted, _ = teacher(batch.arguments)
                    _, made, _ = module(batch.arguments, teacher.given)
                told.append(_times(regression_losses(made, wanted, list(units.values())), share))
            return _sum(told)

        with _learning(student, names):
            training = Training(
                name, watched, _parameters(student, names), settings.plan(settings.layerwise, settings.layerwise_rate),
                self.accelerator,
            )  # fmt: skip
            curves = training.run(losses, self.context).curves
        return {"parts alone, error at first": curves[0]["parts alone"], "at last": curves[-1]["parts alone"]}

    def end_to_end(self, name: str, names: list[str]) -> Progress:
        """Learn the original's answers and features."""
        student, settings = self.graph.model, self.settings
        blocks = _compared(self.graph) if settings.feature else []
        teacher, watched = Watched(self.teacher, blocks), Watched(student, blocks)
        sampler = self.held_out.sampler if settings.guided else None
        energy = self._energy()

        def losses(module: nn.Module, number: int) -> dict[str, Tensor]:
            told: list[dict[str, Tensor]] = []
            for batch, share in self._parts_of_batch(number):
                with self.products():
                    with torch.no_grad():
                        wanted = teacher(batch.arguments)
                    made = module(batch.arguments)
                guidance = guidance_of(batch, sampler)
                if guidance is not None:
                    guidance = guidance.to(self.accelerator.device)
                found = distillation_losses(
                    made, wanted, energy, guidance, batch.arguments.get(LATENTS),
                    settings.feature if blocks else 0.0, settings.balance,
                )  # fmt: skip
                told.append(_times(found, share))
            return _sum(told)

        with _learning(student, names):
            training = Training(
                name, watched, _parameters(student, names), settings.plan(settings.steps, settings.rate), self.accelerator
            )  # fmt: skip
            return training.run(losses, self.context, lambda: self.held_out.error(student), POINTS)

    def _energy(self) -> float:
        """What the loss of the answers is relative to: that of the original's answers, a sample."""
        held_out, total, samples = self.held_out, 0.0, 0
        sampler = held_out.sampler if self.settings.guided else None
        for batch, wanted in zip(held_out.batches, held_out.wanted, strict=True):
            guidance = guidance_of(batch, sampler)
            total += float(squared(wanted, torch.ones(len(batch.steps)), guidance, batch.arguments.get(LATENTS)))
            samples += len(batch.steps)
        return max(total / samples, 1e-30)


def _chosen(model: nn.Module, train: list[str] | str) -> list[str]:
    """Names of the parameters that learn."""
    patterns = [train] if isinstance(train, str) else train
    places = tuple(f"{place}." for place in parts_of(model))
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        if pattern == "all":
            matching = names
        elif pattern in WORDS:
            matching = [name for name in names if name.startswith(places)]
            matching = [name for name in matching if pattern == "parts" or ROUTER in name]
        else:
            matching = fnmatch.filter(names, pattern)
        if not matching:
            raise DitqError(
                f"pass 'distill': train: {pattern!r} matches no parameter; give all, parts, routers or a pattern of names"
            )
        found.update(matching)
    return [name for name in names if name in found]


def _compared(graph: DiTGraph) -> list[str]:
    """The blocks whose outputs are to be the original's: also where nothing is left of a block but what it hands on."""
    names = [*graph.blocks, *(name for name in scheduled_blocks(graph.model) if name not in graph.blocks)]
    found = {name: graph.model.get_submodule(name) for name in names}
    return [name for name, block in found.items() if not isinstance(block, StructuralPart) or block.compared]


def _parameters(model: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(name) for name in names}


@contextmanager
def _learning(model: nn.Module, names: list[str]) -> Iterator[None]:
    """These parameters have gradients, and parts know that they learn, while the block runs; dropout stays off."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    for part in parts_of(model).values():
        for module in part.modules():
            module.training = not isinstance(module, nn.Dropout)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _on(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """The models on that device while the block runs, then where they were."""
    places = [next(model.parameters()).device for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, place in zip(models, places, strict=True):
            model.to(place)


def _accelerator() -> Any:
    """All processes that `accelerate launch` started, or this one alone."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    on_gpu = torch.cuda.is_available()
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not on_gpu, mixed_precision="no", kwargs_handlers=[unused])


def _agreed(accelerator: Any, error: float) -> float:
    """The first process's figure, on all of them."""
    from accelerate.utils import broadcast_object_list

    return float(broadcast_object_list([error])[0])


def _times(losses: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    return {key: value * share for key, value in losses.items()}


def _sum(told: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([losses[key] for losses in told]).sum() for key in told[0]}


def _write_down(report: DistillReport, progress: Progress) -> None:
    """At most `SHOWN` means of neighbouring steps, and what was judged on the way."""
    length = -(-len(progress.curves) // SHOWN)
    for start in range(0, len(progress.curves), length):
        run = progress.curves[start : start + length]
        means = {key: sum(told[key] for told in run) / len(run) for key in ("output", "features", "balance")}
        report.curves.append({"step": start + len(run), **means})
    report.summary["seconds a step"] = progress.seconds
    report.held_out += [{"step": step, "error, dB": decibels(error)} for step, error in progress.judged]
