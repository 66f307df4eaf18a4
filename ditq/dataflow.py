"""Walks over the record of one forward: what a value is made of, who reads it, seen through views of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ditq.trace import Call, Trace, Value

SAME = {"to", "contiguous", "clone", "detach", "dropout", "alias"}
VIEWS = SAME | {
    "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "getitem", "split",
    "split_with_sizes", "chunk", "unbind", "cat", "expand", "narrow", "movedim", "get",
}  # fmt: skip

ATTENTION = {"scaled_dot_product_attention", "token_attention", "channel_attention"}
ACTIVATIONS = {"gelu", "silu", "relu", "tanh", "sigmoid", "mish", "elu", "softplus", "hardswish", "leaky_relu", "relu6"}


class Dataflow:
    """`trace` of `model`, with its linears and the first call of each. `repeated`: those that are called more than once."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.calls: dict[str, Call] = {}
        self.repeated: set[str] = set()
        for call in trace.calls:
            of_linear = call.function == "linear" and call.module in self.linears
            if of_linear and call is not self.calls.setdefault(call.module, call):
                self.repeated.add(call.module)
        self._site_of = {call.outputs[0]: name for name, call in self.calls.items()}

    def _source(self, value: Value) -> Value:
        """The value that `value` is merely another name for."""
        while (call := self.trace.producer.get(value)) and call.function in SAME:
            value = call.inputs[0]
        return value

    def _readers(self, value: Value) -> Iterator[Call]:
        """The calls that read `value`, seen through renamings of it."""
        for call in self.trace.consumers.get(value, []):
            if call.function in SAME:
                yield from self._readers(call.outputs[0])
            else:
                yield call

    def _readers_of_scores(self, value: Value) -> Iterator[Call]:
        """The calls that read `value`, seen through views of it, activations, magnitudes and sums with parameters."""
        for call in self.trace.consumers.get(value, []):
            with_parameter = call.function == "add" and any(other.parameter for other in call.inputs)
            if call.function in VIEWS | ACTIVATIONS | {"abs"} or with_parameter:
                for output in call.outputs:
                    yield from self._readers_of_scores(output)
            else:
                yield call

    def _rows_behind(self, value: Value) -> Value:
        """The value of which `value` is a choice of rows, as experts read it; else itself."""
        call = self.trace.producer.get(value)
        if call is None or not _chooses_rows(call):
            return value
        behind = call.argument(1, "weight")
        while (made := self.trace.producer.get(behind)) and made.function in VIEWS and len(made.inputs) == 1:
            if made.inputs[0].shape[-1] != behind.shape[-1]:
                break
            behind = made.inputs[0]
        return self._source(behind)

    def _readers_of_rows(self, value: Value) -> Iterator[Call]:
        """The calls that read `value`, seen through choices of its rows."""
        for call in self._readers(value):
            if call.function in VIEWS and call.outputs[0].shape[-1] == value.shape[-1]:
                chosen = list(self._readers(call.outputs[0]))
                if chosen and all(_chooses_rows(reader) for reader in chosen):
                    for reader in chosen:
                        yield from self._readers(reader.outputs[0])
                    continue
            yield call

    def _linears_behind(self, value: Value, pure: bool) -> tuple[list[str], bool]:
        """Linears from which `value` is made, and whether only views lie between. `pure` stops at anything else."""
        found: list[str] = []
        only_views, seen, pending = True, set[Value](), [value]
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            call = self.trace.producer.get(value)
            if value in self._site_of:
                found.append(self._site_of[value])
            elif call is None or call.function in ATTENTION | {"linear"}:
                only_views = False
            elif call.function in VIEWS:
                pending.extend(call.inputs)
            else:
                only_views = False
                if not pure:
                    pending.extend(call.inputs)
        order = list(self.calls)
        return sorted(set(found), key=order.index), only_views

    @staticmethod
    def _along_channels(call: Call, place: int = 1) -> bool:
        """Does a concatenation, or a split whose argument of that place is its dimension, run along the last one?"""
        dimension = call.argument(place, "dim", 0)
        return dimension in (-1, len(call.outputs[0].shape) - 1)

    @staticmethod
    def _sees_tokens(call: Call) -> bool:
        return size_of(call.inputs[0].shape[1:-1]) > 1


def size_of_value(value: Value) -> int:
    return size_of(value.shape)


def size_of(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _chooses_rows(call: Call) -> bool:
    """Is it a lookup of rows in what was computed, not in a table of parameters?"""
    return call.function == "embedding" and call.argument(1, "weight").parameter is None
