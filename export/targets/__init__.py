"""Export targets: each file here lowers the graph to the forms that one runtime runs fast. Nothing else lists them.

A target is one file that ends in `TARGET = register(Target(...))`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.nn import QuantLinear
from ditq.numerics.carrier import FLOAT4, INT8

if TYPE_CHECKING:
    from ditq.export.engine import Engine
    from ditq.export.fusion_report import FusionReport

Runner = Callable[[Mapping[str, Tensor]], Tensor]
Kind = Literal["integer", "float8", "float4", "weight-only kernel", "dequantized"]


@dataclass(frozen=True)
class PlannedMatMul:
    """What a target means a quantized linear to run as, and where it stands in the graph (names of values).

    input: what the layer reads, or with rows: the numbers of the rows of it that the layer reads; product: what its matmul
    makes; output: what the layer makes, bias included; inner: what
    the second integer matmul makes of a layer that has one for its low-rank branch; graph: the engine's file it stands in;
    groups: what the matmul of each group of channels makes, in their order, where there is one for each; product is then
    the sum;
    numbers: of a product of an attention with rounded parts, what holds the numbers of each, by `<attention>/<part>`; its
    site is `<attention>/scores`, `/values`, or `/attention` for both products in one;
    parts: what the input is put together of, along its last axis, where the graph holds these and not the input itself.
    """

    site: str
    kind: Kind
    input: str
    product: str
    output: str
    inner: str | None = None
    graph: str = "model.onnx"
    groups: tuple[str, ...] = ()
    numbers: Mapping[str, str] | None = None
    rows: str | None = None
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("groups", "parts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, where it comes from JSON

    @property
    def read(self) -> tuple[str, ...]:
        """The values of the graph that are the input, one behind the other along the last axis."""
        return self.parts or (self.input,)

    @property
    def coded(self) -> tuple[str, ...]:
        """What the matmuls with the codes make: of each group, or the one there is."""
        return self.groups or (self.product,)


@dataclass(frozen=True)
class RunOptions:
    """How an engine is to be run.

    threads: of ONNX Runtime; None leaves the choice to it. decoded: whether weights lie decoded in the GPU's memory, in 8 bits:
    more of it, and less time (target `cuda`).
    """

    threads: int | None = None
    decoded: bool = False


USUAL = RunOptions()


@dataclass(frozen=True)
class Target:
    """A runtime that engines are made for or run by.

    Attributes:
        name: short name, e.g. `onnxruntime-cpu`.
        description: one line.
        available: () -> (whether it runs here, why not).
        lower: (graph with ditq::QuantLinear nodes, layers by site) -> what each matmul is planned as; rewrites the
            graph in place. None: the target runs the engine without a graph.
        runner: (engine, options) -> a function of input tensors by name, of the engine's own dtypes and on `device`,
            that returns the output.
        prove: (engine) -> by what was built of it, what became of the planned low-bit products. None: nothing is proven.
        plans: whether the engine's graph is built for single kinds of GPU (`ditq plan`).
        decodes: whether its runner heeds `decoded`.
        half: whether it multiplies in half precision what is not low-bit.
        shares: (engine, inputs of a call, threads) -> shares of its time by kinds of work, where a runtime on the CPU can tell
            (export/time_shares.py); of one on a GPU its kernels do.
        carriers: of the products of quantized inputs that it has (numerics/carrier.py); inputs in floating point go with any.
        device: where its runner takes inputs; dtype: what a pipeline around it should compute in.
        check: (model) -> None, or DitqError for a part that it cannot run. A target with `check` and without `lower` can be
            compiled for: its engines hold weights and no graph.
    """

    name: str
    description: str
    available: Callable[[], tuple[bool, str]]
    lower: Callable[[ir.Model, Mapping[str, QuantLinear]], list[PlannedMatMul]] | None
    runner: Callable[[Engine, RunOptions], Runner]
    carriers: tuple[str, ...] = (INT8.name,)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    check: Callable[[nn.Module], None] | None = None
    prove: Callable[[Engine], Mapping[str, FusionReport]] | None = None
    plans: bool = False
    half: bool = False
    decodes: bool = False
    shares: Callable[[Engine, Mapping[str, Tensor], int | None], Mapping[str, float]] | None = None

    def check_product(self, site: str, carrier: str, activation_bits: int) -> None:
        """Raise DitqError for a linear whose quantized input and weight this target cannot multiply."""
        if activation_bits < 16 and carrier not in self.carriers:
            instead = (
                "another format than nvfp4"
                if carrier == FLOAT4.name
                else f"carrier: {self.carriers[0]}, or a format with a16"
            )
            raise DitqError(f"{site}: {self.name} has no product of {carrier} numbers; set {instead}")


_targets: dict[str, Target] = {}


def register(target: Target) -> Target:
    """Called once by each target's file."""
    _targets[target.name] = target
    return target


def targets() -> dict[str, Target]:
    """All targets by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_targets.items()))


def target(name: str) -> Target:
    """One target.

    Raises:
        DitqError: there is none of that name.
    """
    known = targets()
    if not isinstance(name, str) or name not in known:
        raise DitqError(f"target '{name}' is not known; one of: {', '.join(known)}")
    return known[name]
