"""What TensorRT says that it built: each layer of a plan with the types of what it reads and the ONNX nodes that it came from.

The builder writes the layer information into its log once a plan is done, the same text that the engine inspector gives; the
inspector wants a GPU, the log does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\S*), ")
_TENSOR = re.compile(r"Dimensions: \[([^\]]*)\][^{}]*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PARTS = ("Inputs", "Constants", "Outputs")


@dataclass(frozen=True)
class Layer:
    """One kernel, or a call of one. inputs, constants: types such as `Int8`, of tensors of more than one number."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    nodes: tuple[str, ...]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Layer:
        """What `dataclasses.asdict` made of it, read back from JSON."""
        lists = {name: tuple(entry[name]) for name in ("inputs", "constants", "nodes")}
        return cls(str(entry["name"]), str(entry["kind"]), **lists)

    @property
    def types(self) -> str:
        """What it multiplies: `Int8 x Int8`."""
        return " x ".join((*self.inputs, *self.constants))

    @property
    def multiplies(self) -> bool:
        """Whether it is a product of matrices, a convolution or an attention."""
        if self.kind in ("gemm", "correlation", "convolution"):
            return True
        return "mha" in self.name or (self.kind != "kgen" and bool(re.search(r"Fc|Dot|Gemm|gemm", self.name)))


def read_layers(log: Iterable[str]) -> list[Layer]:
    """The layers of the plan that was built last.

    Raises:
        ValueError: the log holds no layer information in a known form.
    """
    text = next((message for message in reversed(list(log)) if message.startswith("Layers:\n")), None)
    if text is None:
        raise ValueError("the builder's log holds no layer information")
    layers = []
    for line in text.splitlines()[1:]:
        found = _LAYER.match(line)
        if found is None:
            break
        inputs, constants, _ = (_types(line, part) for part in _PARTS)
        layers.append(Layer(found["name"], found["kind"], inputs, constants, tuple(_NODE.findall(line))))
    return layers


def _types(line: str, part: str) -> tuple[str, ...]:
    """Types of the tensors listed under `part: [...]`, without single numbers."""
    start = line.find(f" {part}: [")
    stop = min((at for at in (line.find(f", {name}", start) for name in (*_AFTER[part],)) if at > 0), default=len(line))
    tensors = _TENSOR.findall(line[start:stop])
    return tuple(kind for dimensions, kind in tensors if dimensions.replace(",", "").strip("1 ") != "")


_AFTER = {"Inputs": ("Constants: [",), "Constants": ("Outputs: [",), "Outputs": ("TacticName:",)}
