"""The error of each linear, and its weights and inputs before and after: both models run side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditq.nn.call_timestep import ARGUMENT, tell_timestep
from ditq.nn.quant_linear import QuantLinear
from ditq.nn.structural.ordered_tokens import order_as
from ditq.progress import ProgressSetting, progress_bar
from ditq.report.alignment import Alignment
from ditq.report.evaluation import Histogram, SiteHistograms, SiteResult
from ditq.report.metrics import decibels, energy_ratio

ROWS = 128  # tokens of one call that are compared at each site: bounds what is kept of a large model
BINS = 81
Call = Mapping[str, Any]


def quantized_sites(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears of a model by the name that the layer has in the original."""
    return {module.site: module for module in model.modules() if isinstance(module, QuantLinear)}


Pair = tuple[nn.Module, nn.Module]  # the layer in the original, and what stands in its place


def _paired(original: nn.Module, quantized: nn.Module, sites: Sequence[str] | None) -> dict[str, Pair]:
    """Of those sites that both models have: what structural passes put in has no counterpart."""
    after: dict[str, nn.Module] = dict(quantized_sites(quantized))
    both = [dict(model.named_modules()) for model in (original, quantized)]
    names = [name for name in (after if sites is None else sites) if all(name in modules for modules in both)]
    return {name: (both[0][name], after.get(name) or both[1][name]) for name in names}


def rows_of(x: Tensor, limit: int = ROWS) -> Tensor:
    """At most `limit` rows of x [..., C], evenly spread: [rows, C]."""
    flat = x.detach().reshape(-1, x.shape[-1])
    count = min(limit, flat.shape[0])
    return flat[torch.arange(count, device=flat.device) * flat.shape[0] // count]


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], watch: Any) -> Iterator[None]:
    """Call watch(name, input, output) after each forward of the named modules inside the block."""
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: watch(name, inputs[0], output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Energies:
    """Sums over the calls for one site: y the original's output, y' the other's."""

    alignment: Alignment | None = None
    signal: float = 0.0  # ||y||^2
    side_by_side: float = 0.0  # ||y - y'||^2
    local: float = 0.0
    kept: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, output: Tensor) -> None:
        a, b = reference.double(), output.double()
        self.signal += float(a.square().sum())
        self.side_by_side += float((a - b).square().sum())
        if self.alignment is not None:
            self.alignment.add(a, b)


@torch.no_grad()
def per_layer_sqnr(
    original: nn.Module,
    quantized: nn.Module,
    calls: Sequence[Call],
    *,
    sites: Sequence[str] | None = None,
    kinds: Mapping[str, str] | None = None,
    alignments: Mapping[str, Alignment] | None = None,
    progress: ProgressSetting = None,
) -> list[SiteResult]:
    """Signal-to-quantization-noise ratio of every site's output, 10 log10(sum ||y||^2 / sum ||y - y'||^2), in dB.

    Both models run on the same calls (keyword arguments of their forward), with their tokens in one order, that of
    `quantized`, which the original has from then on; the outputs of equal sites are compared,
    so a site's number holds the error of its input as well. Besides, each layer alone is fed the original's input;
    that number is given only where it is no worse, since a layer whose input basis was changed upstream by a folded
    scale or rotation gives nonsense on the original's input.

    Args:
        sites: names of modules to compare; by default the quantized linears.
        kinds: what to call each site in the report.
        alignments: a fresh one for each site whose output a pass may have written in another basis. Where the outputs
            agree 3 dB better after it, what is left then is reported, marked `aligned`.
    """
    order_as(original, quantized)
    pairs = _paired(original, quantized, sites)
    energies = {name: _Energies((alignments or {}).get(name)) for name in pairs}

    def before(name: str, x: Tensor, y: Tensor) -> None:
        kept = rows_of(y)
        energies[name].kept.append(kept)
        alone = pairs[name][1](rows_of(x))
        energies[name].local += float((kept.double() - alone.double()).square().sum())

    def after(name: str, _: Tensor, y: Tensor) -> None:
        energies[name].add(energies[name].kept.pop(0), rows_of(y))

    with progress_bar("layers", len(calls), progress) as bar:
        for call in calls:
            if ARGUMENT in call:
                tell_timestep(quantized, call[ARGUMENT])  # its layers run alone first
            with _hooked({name: pair[0] for name, pair in pairs.items()}, before):
                original(**call)
            with _hooked({name: pair[1] for name, pair in pairs.items()}, after):
                quantized(**call)
            bar.advance()
    return [_result(name, pairs[name], energies[name], (kinds or {}).get(name, "")) for name in pairs]


def _result(name: str, pair: Pair, energy: _Energies, kind: str) -> SiteResult:
    ratio = decibels(energy_ratio(energy.side_by_side, energy.signal))
    local: float | None = decibels(energy_ratio(energy.local, energy.signal))
    left = None if energy.alignment is None else energy.alignment.left()
    brought_back = None if left is None else decibels(energy_ratio(left, energy.signal))
    aligned = brought_back is not None and brought_back > ratio + 3
    if aligned:
        assert brought_back is not None
        ratio, local = brought_back, None
    elif local is not None and local < ratio - 1e-9:
        local = None
    weight: Any = pair[0].weight
    return SiteResult(name, format_of(pair[1]), kind, weight.numel(), ratio, local, aligned)


def format_of(layer: nn.Module) -> str:
    """Short name of how a layer is stored and fed, e.g. "w4a8 twin_log"; the dtype of one that is not quantized."""
    if isinstance(layer, QuantLinear):
        activation = "16" if layer.activation.granularity == "none" else str(layer.activation.bits)
        return f"w{layer.bits}a{activation} {layer.codebook}".strip()
    weight: Any = layer.weight
    return str(weight.dtype).removeprefix("torch.")


def histogram(values: Tensor, bins: int = BINS) -> Histogram:
    """Counts of the values in `bins` equal bins over [-absmax, absmax]."""
    flat = values.detach().float().flatten()
    absmax = float(flat.abs().max())
    counts = torch.histc(flat, bins=bins, min=-absmax or -1.0, max=absmax or 1.0)
    return Histogram(absmax, float(flat.double().square().mean().sqrt()), [int(count) for count in counts])


@torch.no_grad()
def site_histograms(
    original: nn.Module, quantized: nn.Module, calls: Sequence[Call], sites: Sequence[str]
) -> list[SiteHistograms]:
    """Weights and inputs of the named sites before and after; after = in the basis in which they are quantized.

    The inputs of the quantized layer are taken behind its online transform (scale, shift, rotation), before rounding.
    """
    pairs = _paired(original, quantized, sites)
    inputs: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in pairs}

    def after(name: str, x: Tensor, _: Tensor) -> None:
        transform = getattr(pairs[name][1], "transform", None)
        inputs[name][1].append(rows_of(x if transform is None else transform(x.float())))

    for call in calls:
        with _hooked({name: pair[0] for name, pair in pairs.items()}, lambda n, x, _: inputs[n][0].append(rows_of(x))):
            original(**call)
        with _hooked({name: pair[1] for name, pair in pairs.items()}, after):
            quantized(**call)
    return [
        SiteHistograms(
            name,
            histogram(_weight(pair[0])),
            histogram(_weight(pair[1])),
            histogram(torch.cat(inputs[name][0])),
            histogram(torch.cat(inputs[name][1])),
        )
        for name, pair in pairs.items()
    ]


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight() if isinstance(layer, QuantLinear) else weight
