"""Writes nodes into an ONNX graph in front of a given node, with constants and weights shared across the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tensor_adapters
from torch import Tensor

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


class Writer:
    """Appends operators in front of `at`, a node of `graph`. `scope` starts the names of what is written (a site)."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.at: ir.Node | None = None
        self.scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._taken = {value.name for node in self.graph for value in node.outputs} | set(self.graph.initializers)

    def move(self, at: ir.Node, scope: str) -> None:
        """From now on write in front of `at`, under names that start with `scope`."""
        self.at, self.scope = at, scope

    def op(self, kind: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output, whose value is called `<scope>/<name>`."""
        return self.ops(kind, 1, *inputs, name=name, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """One node with several outputs."""
        assert self.at is not None
        values = [ir.Value(name=self._free(f"{self.scope}/{name or kind.lower()}")) for _ in range(outputs)]
        node = ir.node(kind, inputs, attributes or None, domain=domain, outputs=values, name=values[0].name)
        self.graph.insert_before(self.at, node)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        return values

    def constant(self, array: Any, dtype: Any = None, name: str = "constant") -> ir.Value:
        """An initializer; equal arrays are one initializer."""
        value = np.ascontiguousarray(np.asarray(array, dtype=dtype)).reshape(np.shape(array))
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(self._free(name), ir.tensor(value))
        return self._constants[key]

    def state(self, name: str, tensor: Tensor) -> ir.Value:
        """The initializer that is the tensor `name` of the model's state dict."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self._initializer(name, tensor_adapters.TorchTensor(tensor.detach().contiguous(), name=name))

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        self._taken.add(name)
        self.graph.register_initializer(value)
        return value

    def _free(self, name: str) -> str:
        found, number = name, 1
        while found in self._taken:
            number += 1
            found = f"{name}.{number}"
        self._taken.add(found)
        return found
