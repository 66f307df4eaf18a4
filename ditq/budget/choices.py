"""Every linear of the choice in every candidate format, and what each takes on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ditq.budget.request import KEEP, Candidate
from ditq.errors import DitqError
from ditq.export.weights_file import narrowed
from ditq.formats import NVFP4, BitFormat
from ditq.graph import DiTGraph
from ditq.nn import InputTransform, QuantLinear
from ditq.nn.call_timestep import ARGUMENT, tell_at_each_call
from ditq.numerics.rotation import PermuteStep
from ditq.parts import LinearSite
from ditq.passes import Context
from ditq.passes.activation_formats import InputFormats
from ditq.passes.base import SiteCache
from ditq.passes.folding import plain_linear
from ditq.passes.quantize import Quantize, stored_bits
from ditq.passes.site_settings import SiteSettings, check_site_settings

ENTRY = 96  # bytes of a tensor's entry in the file's header beside its name: dtype, shape, two offsets
UNPACKING = 32 << 10  # tables that say what a byte of codes stands for, a few KB for each width of codes


@dataclass(frozen=True, eq=False)
class Choices:
    """N linears with F candidates each.

    Attributes:
        sites: names of the linears, in the order of the model.
        names: names of the candidates, `w4`, `w4g64`, `w4r8` or `keep`.
        layers: for each site and candidate what would stand there; the linear itself for `keep`.
        weights: int64 [N], entries of each weight.
        bits: int64 [N, F], bits of each coded weight: codes, table, scales, multipliers, branch.
        bytes: int64 [N, F], what each layer takes in the file of weights, with its bias and its entry in the header.
        fixed: bytes of all else in that file.
        held: sites that have no choice and keep the format of the recipe: all their candidates are that one.
    """

    sites: tuple[str, ...]
    names: tuple[str, ...]
    layers: tuple[tuple[nn.Module, ...], ...]
    weights: NDArray[np.int64]
    bits: NDArray[np.int64]
    bytes: NDArray[np.int64]
    fixed: int
    held: frozenset[str] = frozenset()

    def size(self, choice: NDArray[np.int64]) -> int:
        """Bytes of the file of weights with that choice [N]."""
        return self.fixed + int(self.bytes[np.arange(len(choice)), choice].sum())

    def bits_a_weight(self, choice: NDArray[np.int64]) -> float:
        """Stored bits over entries, all linears of the choice together."""
        return float(self.bits[np.arange(len(choice)), choice].sum() / self.weights.sum())

    def by_first_names(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same layers, of names that mean one layer the first."""
        first = [row.index(row[index]) for row, index in zip(self.layers, choice, strict=True)]
        return np.array(first, dtype=np.int64)

    def labels(self, choice: NDArray[np.int64]) -> dict[str, str]:
        """The candidate's name of each site that has a choice."""
        pairs = zip(self.sites, choice, strict=True)
        return {site: self.names[index] for site, index in pairs if site not in self.held}

    def tell_timestep(self, arguments: Mapping[str, Any]) -> None:
        """Let all candidates take the scales of that call's timestep, where they have one for each timestep bin."""
        for layer in chain.from_iterable(self.layers):
            if isinstance(layer, QuantLinear) and layer.activation.granularity == "timestep":
                layer.timestep = arguments[ARGUMENT]

    @contextmanager
    def placed(self, graph: DiTGraph, choice: NDArray[np.int64]) -> Iterator[None]:
        """Within it the graph has the chosen layers; after it, what it had before."""
        before = {site: graph.linear(site) for site in self.sites}
        try:
            for row, site in enumerate(self.sites):
                graph.replace(site, self.layers[row][choice[row]])
            yield
        finally:
            for site, module in before.items():
                forget(graph.linear(site))
                graph.replace(site, module)


def answer_of(layer: nn.Module, given: Tensor) -> Tensor:
    """What a candidate gives for an input; nothing of it is kept, since all candidates decoded are many times the model."""
    try:
        return layer(given)
    finally:
        forget(layer)


def forget(layer: nn.Module) -> None:
    """Free what a candidate keeps of its weights in float32."""
    if isinstance(layer, QuantLinear):
        layer.forget()


def candidate_settings(settings: SiteSettings, name: str, site: LinearSite) -> SiteSettings:
    """A site's settings with the candidate's bits, groups and rank in the place of its own; activations stay as the recipe has
    them.

    Raises:
        DitqError: the format fixes the bits, or groups do not divide the linear's inputs.
    """
    if name == KEEP:
        return replace(settings, keep=True)
    if settings.format == NVFP4:
        raise DitqError(
            "budget: chooses bits of weights, which nvfp4 fixes; set another format, or leave the budget out"
        )
    activation = BitFormat.parse(settings.format).activation
    wanted = Candidate.parse(name)
    found = replace(settings, format=f"w{wanted.bits}a{activation}")
    if wanted.group is not None:
        if wanted.group and site.in_features % wanted.group:
            raise DitqError(
                f"budget: candidate {name}: {site.name}: groups of {wanted.group} do not divide its {site.in_features} inputs"
            )
        found = replace(found, group_size=wanted.group)
    if wanted.rank is not None:
        return replace(found, rank=wanted.rank)
    if wanted.share is not None:
        return replace(found, rank=0, rank_share=wanted.share).ranked(site.out_features, site.in_features)
    return found


def check_candidates(graph: DiTGraph, step: Quantize, sites: Collection[str], names: Sequence[str]) -> None:
    """Raise DitqError unless each of these linears can be quantized as each candidate says."""
    for site, given in step.plan(graph).items():
        for name in names if site in sites else ():
            where, wanted = f"budget: candidate {name}", candidate_settings(given, name, graph.sites[site])
            check_site_settings(wanted, where)
            step.check_site(graph, site, wanted, where)


def make_choices(
    graph: DiTGraph,
    step: Quantize,
    context: Context,
    names: tuple[str, ...],
    cache: Callable[[str], SiteCache | None] = lambda _: None,
    held: Collection[str] = (),
) -> Choices:
    """Code every linear that the pass quantizes in every candidate format; the graph stays as it is.

    Args:
        graph: after the passes that stand before `step`.
        cache: for each candidate, where its finished codes are kept.
        held: sites that keep the format which the recipe gives them.
    """
    plan = step.plan(graph)
    formats = InputFormats(graph, plan, context.calibration)
    kept = frozenset(held) & plan.keys()
    if not plan.keys() - kept:
        raise DitqError("budget: rules give the format of all that the recipe quantizes, so there is nothing to choose")
    check_candidates(graph, step, plan.keys() - kept, names)
    work = [(site, name) for name in names for site in plan]
    layers: dict[tuple[str, str], nn.Module] = {}
    for site, name in context.track("candidates", work):
        if site in kept:
            context.site_cache = cache(names[0])
            if name == names[0]:
                layers[site, name], _ = step.layer_for(graph, context, site, plan[site], formats)
            layers[site, name] = layers[site, names[0]]
            continue
        if name == KEEP:
            layers[site, name] = graph.linear(site)
            continue
        wanted = candidate_settings(plan[site], name, graph.sites[site])
        first = next(n for n in names if candidate_settings(plan[site], n, graph.sites[site]) == wanted)
        if first == name:
            context.site_cache = cache(name)
            layers[site, name], _ = step.layer_for(graph, context, site, wanted, formats)
        layers[site, name] = layers[site, first]
    table = tuple(tuple(layers[site, name] for name in names) for site in plan)

    def bits(site: str, name: str) -> int:
        layer = layers[site, name]
        return (
            stored_bits(layer)
            if isinstance(layer, QuantLinear)
            else 8 * narrowed(plain_linear(graph, site).weight).nbytes
        )

    if any(isinstance(layer, QuantLinear) and layer.activation.granularity == "timestep" for layer in layers.values()):
        tell_at_each_call(graph.model)
    own = tuple(f"{site}." for site in plan)
    rest = {name: tensor for name, tensor in graph.model.state_dict().items() if not name.startswith(own)}
    return Choices(
        tuple(plan),
        names,
        table,
        np.array([graph.sites[site].parameters for site in plan], dtype=np.int64),
        np.array([[bits(site, name) for name in names] for site in plan], dtype=np.int64),
        np.array([[_bytes(f"{site}.", layers[site, name].state_dict()) for name in names] for site in plan]),
        _bytes("", rest) + graph_constants(table),
        kept,
    )


def graph_constants(table: Iterable[Iterable[nn.Module]]) -> int:
    """Bytes that the ONNX graph itself brings into the file, at most: tables that unpack codes, matrices of rotations."""
    tensors: dict[bytes, int] = {}
    for layer in chain.from_iterable(table):
        transform = getattr(layer, "transform", None)
        for _, _, rotation in transform.rotations if isinstance(transform, InputTransform) else ():
            for step in rotation.steps:
                tensor = step.index if isinstance(step, PermuteStep) else step.matrix.float()
                tensors[tensor.numpy().tobytes()] = tensor.nbytes + ENTRY
    return UNPACKING + sum(tensors.values())


def _bytes(prefix: str, state: Mapping[str, Tensor]) -> int:
    return sum(narrowed(tensor).nbytes + len(prefix) + len(name) + ENTRY for name, tensor in state.items())
