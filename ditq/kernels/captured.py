"""Calls of a compiled model replayed as CUDA graphs: one for each combination of shapes, without Python in between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

KEPT = 8  # combinations of shapes whose graphs are kept, the last used ones
_WARM_UP = 3  # calls before the capture: they compile, measure tiles and allocate


T = TypeVar("T")
_holding: list[list[object]] = []  # of the captures that are under way


def hold(value: T) -> T:
    """`value`, which a graph that is being recorded reads, and which must stay for as long as the graph does."""
    if _holding:
        _holding[-1].append(value)
    return value


@contextmanager
def holding() -> Iterator[list[object]]:
    """What is held while the block runs."""
    _holding.append([])
    try:
        yield _holding[-1]
    finally:
        _holding.pop()


@dataclass(frozen=True)
class _Captured:
    inputs: dict[str, Tensor]
    output: Tensor
    graph: Any
    held: list[object]

    def replay(self, inputs: Mapping[str, Tensor]) -> Tensor:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.output.clone()  # the next replay writes there again


class CapturedCalls:
    """A function of tensors by name, whose launches are recorded at the first call of each combination of shapes."""

    def __init__(self, call: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        self.call = call
        self.captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Tensor], *also: Hashable) -> Tensor:
        """also: what else differs between calls that are not recorded as one."""
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))
        key = (shapes, *also)
        if key not in self.captured:
            while len(self.captured) >= KEPT:  # before the next is recorded, which needs the memory
                self.captured.popitem(last=False)
            self.captured[key] = self._with_room(inputs)
        self.captured.move_to_end(key)
        return self.captured[key].replay(inputs)

    def _with_room(self, inputs: Mapping[str, Tensor]) -> _Captured:
        """The call recorded, if need be in the memory of all others' graphs."""
        try:
            return self._capture(inputs)
        except torch.cuda.OutOfMemoryError:
            if not self.captured:
                raise
        self.captured.clear()
        torch.cuda.empty_cache()
        return self._capture(inputs)

    def _capture(self, inputs: Mapping[str, Tensor]) -> _Captured:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                self.call(static)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with holding() as held, torch.cuda.graph(graph):
            output = self.call(static)
        return _Captured(static, output, graph, held)
