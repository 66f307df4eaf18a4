"""The cost model of `ditq inspect`: multiply-adds, parameters, predicted time of a denoiser's call, before and after a recipe.

It counts linears, attentions and what passes say that they put in their place (`Pass.costs`); norms and other elementwise
operators are left out. Times are a roofline's (Williams et al., Communications of the ACM 52(4), 2009):

    sum over works of max(2 macs / peak, bytes / bandwidth) + operations * launch

with everything at its peak: what a device cannot be faster than, not what it will be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch

from ditq.formats import BitFormat
from ditq.graph import DiTGraph
from ditq.parts import Part, Work
from ditq.passes.quantize import Quantize
from ditq.recipe import Recipe

PARTS: tuple[str, ...] = get_args(Part)


@dataclass(frozen=True)
class Costs:
    """Of one call for one sample.

    Attributes:
        works: by the name of a linear or an attention of the model as it came.
        parameters: all of the model's.
        formats: of the linears that are quantized.
    """

    works: Mapping[str, Work]
    parameters: int
    formats: Mapping[str, BitFormat] = field(default_factory=dict)

    @property
    def activated(self) -> int:
        """The parameters without those of experts that a token passes by, as Dense2MoE counts them (arXiv 2510.09094)."""
        return self.parameters - sum(work.parameters - work.activated for work in self.works.values())

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-adds by part."""
        return {part: sum(w.macs for w in self.works.values() if w.part == part) for part in PARTS}

    @property
    def attention_share(self) -> float:
        """The share of the scores in the multiply-adds of tokens inside blocks: N / (N + 6 D) in a plain block."""
        macs = self.macs
        whole = macs["attention scores"] + macs["token linears"] + macs["feed-forward"]
        return macs["attention scores"] / max(whole, 1)

    def seconds(self, device: Device) -> float:
        """The roofline's time on that device."""
        total = 0.0
        for name, work in self.works.items():
            form = self.formats.get(name)
            weight = device.floating if form is None else form.weight
            activation = device.floating if form is None else min(form.activation, device.floating)
            width = 8 if form is not None and activation <= 8 else device.floating
            read = (work.parameters * weight + work.moved * device.floating) / 8
            total += max(work.macs / device.peaks[width], read / device.bandwidth) + work.operations * device.launch
        return total


@dataclass(frozen=True)
class Device:
    """What a device can do at most, and where the numbers are from.

    peaks: multiply-adds a second with numbers of so many bits; bandwidth: bytes a second; launch: seconds that starting an
    operation takes; floating: bits of the numbers that nothing quantizes.
    """

    name: str
    peaks: Mapping[int, float]
    bandwidth: float
    launch: float
    source: str
    floating: int = 16


LAUNCH = 4e-6  # seconds; an assumption: what starting a kernel from a CUDA graph or a plan about takes


def _gpu(name: str, half: float, byte: float, bandwidth: float) -> Device:
    """half, byte: dense tera-operations a second, two for a multiply-add, of bfloat16 and int8; bandwidth in GB/s."""
    peaks = {16: half * 5e11, 8: byte * 5e11}
    return Device(name, peaks, bandwidth * 1e9, LAUNCH, "NVIDIA's data sheet")


GPUS = (
    _gpu("L4", 121, 242, 300),
    _gpu("RTX 4090", 165.2, 660.6, 1008),
    _gpu("A100 SXM 80GB", 312, 624, 2039),
    _gpu("H100 SXM", 989.4, 1978.9, 3350),
)


def costs_before(graph: DiTGraph) -> Costs:
    """Of the model as it is."""
    works = {site.name: Work.of_site(site) for site in graph.sites.values() if site.role != "unused"}
    for attention in graph.attentions.values():
        width = attention.heads * attention.head_width
        # All that is known of the tokens is the product of queries and keys; it moves least where they are as many.
        tokens = round((attention.macs / (2 * width)) ** 0.5)
        works[attention.name] = replace(Work.of_attention(tokens, tokens, width), macs=attention.macs)
    return Costs(works, sum(parameter.numel() for parameter in graph.model.parameters()))


def costs_after(graph: DiTGraph, recipe: Recipe) -> Costs:
    """Of what the recipe would make of it."""
    before = costs_before(graph)
    works = dict(before.works)
    formats: dict[str, BitFormat] = {}
    for step, found in recipe.stages(graph):
        works |= {name: _on_top(works[name], before.works[name], new) for name, new in step.costs(graph).items()}
        if isinstance(step, Quantize):
            plan = {site: BitFormat.parse(settings.format) for site, settings in step.plan(found).items()}
            formats |= {name: form for name in works if (form := _format_at(name, graph, found, plan)) is not None}
    more = sum(work.parameters for work in works.values()) - sum(work.parameters for work in before.works.values())
    return Costs(works, before.parameters + more, formats)


def _on_top(now: Work, first: Work, new: Work) -> Work:
    """What a pass makes of `first`, the model's own, where others have made `now` of that: its share of each number, or what it
    adds to a number that was 0."""

    def both(number: str) -> int:
        was, left, wanted = (getattr(work, number) for work in (first, now, new))
        return round(left * wanted / was) if was else left + wanted

    if now == first:
        return new
    return Work(new.part, *(both(number) for number in ("macs", "parameters", "activated", "moved", "operations")))


def _format_at(name: str, graph: DiTGraph, found: DiTGraph, plan: Mapping[str, BitFormat]) -> BitFormat | None:
    """The format of an original linear, or where a structural pass has put others in its place that of the first of them."""
    if name in found.sites or name not in graph.sites:
        return plan.get(name)
    site = graph.sites[name]
    kinds = set(site.kind.split("+"))
    others = (new for new in found.sites.values() if new.block == site.block and kinds & set(new.kind.split("+")))
    return next((plan[new.name] for new in others if new.name in plan and new.name not in graph.sites), None)


def this_processor() -> Device:
    """This machine's processor, measured in about a second: products in float32 and in int8 as its runtime does them."""
    left, right = torch.randn(256, 1024), torch.randn(1024, 1024)
    plain = 256 * 1024 * 1024 / _fastest(lambda: left @ right)
    source = torch.zeros(2**24)
    bandwidth = 2 * source.numel() * 4 / _fastest(source.clone)
    nothing = torch.zeros(1)
    launch = _fastest(lambda: nothing + nothing)
    return Device("this CPU", {32: plain, 8: _integer_products()}, bandwidth, launch, "measured here", floating=32)


def _integer_products() -> float:
    """Multiply-adds a second of ONNX Runtime's product of uint8 and int8."""
    from onnx import TensorProto, helper

    from ditq.export.session import open_session, session_options

    size = {"x": [256, 1024], "y": [256, 1024]}
    weight = helper.make_tensor("w", TensorProto.INT8, [1024, 1024], bytes(1024 * 1024), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, size["x"])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, size["y"])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(model.SerializeToString(), session_options(torch.get_num_threads()))
    rows = torch.zeros(256, 1024, dtype=torch.uint8).numpy()
    return 256 * 1024 * 1024 / _fastest(lambda: session.run(None, {"x": rows}))


def _fastest(what: Callable[[], Any], rounds: int = 7) -> float:
    """Seconds of the fastest of some calls."""
    found = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        result = what()
        found = min(found, time.perf_counter() - started)
        del result
    return max(found, 1e-9)
