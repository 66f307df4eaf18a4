"""Build plans of an engine's graphs for kinds of GPU, none of which has to be there, and read back what was built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditq.errors import DitqError
from ditq.export.plans.fold import Folded
from ditq.export.plans.layers import Layer, read_layers
from ditq.export.plans.library import Library
from ditq.export.plans.sizes import Shapes

_KEPT = ("INTERNAL_ERROR", "ERROR")


@dataclass(frozen=True)
class Built:
    """A plan and its layers; timing: what the builder measured, for the next build."""

    plan: bytes
    layers: list[Layer]
    timing: bytes


class PlanBuilder:
    """One graph, parsed once and built for as many kinds of GPU as wanted."""

    def __init__(self, library: Library, name: str, folded: Folded, shapes: Shapes) -> None:
        """Raises DitqError for a graph that the library does not take: the ONNX node and the module that it came from."""
        self._library, self._name, self._folded, self._shapes = library, name, folded, shapes
        self._errors: list[str] = []
        self._log: list[str] = []
        trt = library.module
        self._logger = library.logger(self._keep)
        self._builder = trt.Builder(self._logger)
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if flags is None else 1 << int(flags))
        self._parser = trt.OnnxParser(self._network, self._logger)
        self._parse()

    def build(self, gpu: str, timing: bytes = b"") -> Built:
        """The plan for one kind of GPU.

        Raises:
            DitqError: it cannot be built.
        """
        trt = self._library.module
        config = self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if gpu in self._library.gpus():
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), 0)
        cache = config.create_timing_cache(timing)
        config.set_timing_cache(cache, ignore_mismatch=False)
        config.add_optimization_profile(self._profile())
        self._errors.clear()
        self._log.clear()
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise self._refusal(gpu, self._errors[0] if self._errors else "no reason was given")
        try:
            layers = read_layers(self._log)
        except ValueError as error:
            raise DitqError(f"{self._name}: {self._library} built a plan for {gpu}, but {error}") from error
        return Built(bytes(plan), layers, bytes(config.get_timing_cache().serialize()))

    def _keep(self, severity: str, message: str) -> None:
        if severity in _KEPT:
            self._errors.append(message)
        elif message.startswith("Layers:"):
            self._log.append(message)

    def _parse(self) -> None:
        parser, folded = self._parser, self._folded
        self._fix_sizes()
        loads = parser.load_model_proto(folded.proto.SerializeToString()) and all(
            parser.load_initializer(name, array.ctypes.data, array.nbytes) for name, array in folded.constants.items()
        )
        if loads and parser.parse_model_proto():
            return
        if not parser.num_errors:
            raise self._refusal("", self._errors[0] if self._errors else "no reason was given")
        error = parser.get_error(0)
        raise self._refused_node(error.node_name(), error.node_operator(), error.desc())

    def _fix_sizes(self) -> None:
        """Write down each size that is the same in all three shapes: TensorRT wants to know how many heads a mask has."""
        for value in self._folded.proto.graph.input:
            smallest, _, largest = self._shapes[value.name]
            for dimension, first, last in zip(value.type.tensor_type.shape.dim, smallest, largest, strict=True):
                if first == last:
                    dimension.dim_value = first

    def _profile(self) -> Any:
        profile = self._builder.create_optimization_profile()
        for index in range(self._network.num_inputs):
            name = self._network.get_input(index).name
            profile.set_shape(name, *self._shapes[name])
        return profile

    def _refusal(self, gpu: str, message: str) -> DitqError:
        """What the builder says, with the node that it names, if it names one."""
        names = {node.name: node for node in self._folded.proto.graph.node if node.name}
        found = max((name for name in names if name in message), key=len, default=None)
        if found is not None:
            return self._refused_node(found, names[found].op_type, message)
        where = f" for {gpu}" if gpu else ""
        return DitqError(f"{self._name}: {self._library} builds no plan{where}: {_reason(message)}")

    def _refused_node(self, node: str, operator: str, message: str) -> DitqError:
        module = node.rpartition("/")[0] or "none"
        return DitqError(
            f"{self._name}: {self._library} does not take the ONNX node {node} ({operator}, module {module}): "
            f"{_reason(message)}"
        )


def _reason(message: str) -> str:
    """The first line that says more than that a node is invalid."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return (
        next((line for line in lines if not line.startswith("Invalid Node")), *lines[:1])
        if lines
        else "no reason was given"
    )
