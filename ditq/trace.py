"""One forward of the model, recorded: every torch function, which values it read and wrote, and in which module.

Runs on fake tensors, so a model of any size is traced in seconds without computing anything. ditq/structure.py reads roles
off the record.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ditq.nn.structural.scheduled_block import all_blocks
from ditq.quiet import quiet_fake_tensors


@dataclass(frozen=True)
class Value:
    """A tensor that existed during the forward: an input, a parameter, or what a call returned."""

    index: int
    shape: tuple[int, ...]
    parameter: str | None = None


@dataclass(frozen=True)
class Call:
    """One torch function call. `arguments` keeps the call's own layout, with Values where tensors stood."""

    index: int
    function: str
    module: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outputs: tuple[Value, ...]

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(leaf for leaf in tree_leaves((self.arguments, dict(self.keywords))) if isinstance(leaf, Value))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.arguments[position] if len(self.arguments) > position else self.keywords.get(name, default)


@dataclass
class Trace:
    """The record of one forward."""

    calls: list[Call] = field(default_factory=list)
    producer: dict[Value, Call] = field(default_factory=dict)
    consumers: dict[Value, list[Call]] = field(default_factory=dict)
    module_inputs: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # module path -> argument name -> Value | constant
    module_outputs: dict[str, Any] = field(default_factory=dict)  # module path -> what it returned, with Values
    called_by: dict[str, str] = field(default_factory=dict)  # module path -> the module whose forward called it
    results: tuple[Value, ...] = ()  # what the model returned


# Spellings of one operation: operators, in-place forms and reflected operators.
_SPELLINGS = {
    "radd": "add", "iadd": "add", "rmul": "mul", "imul": "mul", "multiply": "mul", "rsub": "sub", "isub": "sub",
    "truediv": "div", "itruediv": "div", "rtruediv": "div", "concat": "cat", "concatenate": "cat", "type": "to", "float": "to",
    "half": "to", "bfloat16": "to", "type_as": "to", "swapaxes": "transpose", "swapdims": "transpose", "view": "reshape",
}  # fmt: skip


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.stack: list[str] = [""]
        self.names = {id(module): name for name, module in model.named_modules()}
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an id is only unique among living tensors
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            self._new(tensor, name)

    def _new(self, tensor: Tensor, parameter: str | None = None) -> Value:
        value = Value(len(self._alive), tuple(tensor.shape), parameter)
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        return value

    def value(self, tensor: Tensor) -> Value:
        found = self._values.get(id(tensor))
        return self._new(tensor) if found is None else found

    def values(self, tree: Any) -> Any:
        return tree_map_only(Tensor, self.value, tree)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments, keywords = self.values(tuple(args)), self.values(dict(kwargs))
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not tensors:
            return result
        name = getattr(func, "__name__", type(func).__name__).strip("_")
        passed_through = [self._values.get(id(tensor)) for tensor in tensors]
        if all(value in arguments for value in passed_through) and name in ("to", "contiguous", "dropout", "float"):
            return result  # returned its own input: nothing happened
        outputs = tuple(self._new(tensor) for tensor in tensors)
        call = Call(len(self.trace.calls), _SPELLINGS.get(name, name), self.stack[-1], arguments, keywords, outputs)
        self.trace.calls.append(call)
        for value in outputs:
            self.trace.producer[value] = call
        for value in dict.fromkeys(call.inputs):
            self.trace.consumers.setdefault(value, []).append(call)
        return result

    def enter(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        name = self.names.get(id(module), self.stack[-1])
        self.trace.called_by[name] = self.stack[-1]
        self.stack.append(name)
        try:
            bound = signature(module.forward).bind(*arguments, **keywords).arguments
        except TypeError:
            bound = dict(keywords)  # the call itself will say what is wrong
        self.trace.module_inputs[name] = {key: self.values(value) for key, value in bound.items()}

    def leave(self, output: Any) -> None:
        self.trace.module_outputs[self.stack.pop()] = self.values(output)


def trace_forward(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Record one forward of `model` on `inputs` (keyword arguments), with all its blocks. Nothing of the model is changed.

    Where the forward reads values out of tensors (which fake tensors do not have) it is run for real instead.
    """
    with all_blocks(model):
        try:
            with quiet_fake_tensors():
                return _record(_beside(model), inputs, FakeTensorMode(allow_non_fake_inputs=True))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return _record(model, inputs, None)


def _beside(model: nn.Module) -> nn.Module:
    """A copy of it with the same tensors. What modules keep from call to call, as Qwen-Image's keep rotations, is then of fake
    tensors in the copy alone."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _record(model: nn.Module, inputs: Mapping[str, Any], fake: FakeTensorMode | None) -> Trace:
    recorder = _Recorder(model)
    if fake is not None:
        inputs = tree_map_only(Tensor, fake.from_tensor, dict(inputs))

    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            handle = module.register_forward_pre_hook(recorder.enter, with_kwargs=True)
            stack.callback(handle.remove)
            handle = module.register_forward_hook(lambda module, arguments, output: recorder.leave(output))
            stack.callback(handle.remove)
        if fake is not None:
            stack.enter_context(fake)
        stack.enter_context(recorder)
        result = model(**inputs, return_dict=False)
        recorder.trace.results = tuple(recorder.value(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    return recorder.trace
