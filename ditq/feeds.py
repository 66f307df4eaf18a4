"""What feeds a group of linears: a norm of its own, or one modulated by a linear or by a table, found in the dataflow."""

from __future__ import annotations

from ditq.dataflow import VIEWS, Dataflow, size_of_value
from ditq.parts import Block, Feed, LinearModulation, NormModulation, TableModulation
from ditq.trace import Call, Value

NORMS = {"layer_norm", "rms_norm"}


class Feeds(Dataflow):
    """The walk backwards from what a group of linears reads."""

    blocks: dict[str, Block]

    def _feed_of(self, value: Value) -> Feed | None:
        call = self.trace.producer.get(value)
        if call is None:
            return None
        if call.function in NORMS:
            return self._own_norm(call)
        if call.function == "mul" and (weight := self._weight_of_scaled(call)) is not None:
            return NormModulation(weight, None)
        shifted = self._split_broadcast(value, "add")
        scaled = self._split_broadcast(shifted[0], "mul") if shifted else None
        if not shifted or not scaled:
            return None
        norm = self.trace.producer.get(self._source(scaled[0]))
        plus_one = self._sum_behind(scaled[1])
        if norm is None or plus_one is None or not (norm.function in NORMS or self._divides_by_rms(norm)):
            return None
        constants = [a for a in plus_one.arguments if not isinstance(a, Value)]
        if constants != [1] or len(plus_one.inputs) != 1:
            return None
        shift, scale = self._modulation_piece(shifted[1]), self._modulation_piece(plus_one.inputs[0])
        if shift is None or scale is None or shift[0] != scale[0]:
            return None
        return self._modulation(shift[0], shift[1], scale[1], value.shape[-1])

    def _sum_behind(self, value: Value) -> Call | None:
        """The addition of which `value` is a view that nothing else reads."""
        while len(self.trace.consumers.get(value, [])) == 1:
            call = self.trace.producer.get(value)
            if call is None or call.function == "add":
                return call
            if call.function not in VIEWS or len(call.inputs) != 1:
                return None
            value = call.inputs[0]
        return None

    def _own_norm(self, call: Call) -> Feed | None:
        weight, bias = call.argument(2, "weight"), call.argument(3, "bias") if call.function == "layer_norm" else None
        if not isinstance(weight, Value) or weight.parameter is None:
            return None
        if len([c for c in self.trace.consumers[weight] if c.function in NORMS]) != 1:
            return None
        return NormModulation(weight.parameter, bias.parameter if isinstance(bias, Value) else None)

    def _divides_by_rms(self, call: Call) -> bool:
        """Is it x * rsqrt(..), the last step of a norm that is written out?"""
        behind = (self.trace.producer.get(self._source(value)) for value in call.inputs)
        return call.function == "mul" and any(made is not None and made.function == "rsqrt" for made in behind)

    def _weight_of_scaled(self, call: Call) -> str | None:
        """The weight of a norm that is written out, of which `call` is the last product; None for anything else, or where
        something else reads the weight too."""
        weights = [value for value in call.inputs if value.parameter is not None]
        others = [self.trace.producer.get(self._source(value)) for value in call.inputs if value.parameter is None]
        if len(weights) != 1 or len(others) != 1 or others[0] is None or not self._divides_by_rms(others[0]):
            return None
        return weights[0].parameter if self._is_read_once(weights[0]) else None

    def _split_broadcast(self, value: Value, function: str) -> tuple[Value, Value] | None:
        """The token operand and the broadcast operand of the call that made `value`, if it is a `function` of two."""
        call = self.trace.producer.get(self._source(value))
        if call is None or call.function != function or len(call.inputs) != 2:
            return None
        first, second = sorted(call.inputs, key=size_of_value, reverse=True)
        if first.shape != call.outputs[0].shape or size_of_value(second) >= size_of_value(first):
            return None
        return first, second

    def _modulation_piece(self, value: Value) -> tuple[Value, int] | None:
        """The vector of which `value` is the k-th equal piece, and k; None if another call reads the piece too."""
        while True:
            if len(self.trace.consumers.get(value, [])) != 1:
                return None
            call = self.trace.producer.get(value)
            if call is None:
                return None
            if call.function in ("chunk", "unbind", "split"):
                return call.inputs[0], call.outputs.index(value)
            if call.function not in VIEWS or len(call.inputs) != 1:
                return None
            value = call.inputs[0]

    def _modulation(self, vector: Value, shift: int, scale: int, width: int) -> Feed | None:
        source, whole, alone, first = vector, size_of_value(vector), self._is_read_once(vector), 0
        while (call := self.trace.producer.get(source)) and call.function in VIEWS and source not in self._site_of:
            if call.function in ("chunk", "split") and size_of_value(source) == whole and _cuts_channels(call):
                # A piece of pieces, as Qwen-Image's: one half for the attention and one for the feed-forward.
                before = call.outputs[: call.outputs.index(source)]
                first += sum(piece.shape[-1] for piece in before)
                whole = size_of_value(call.inputs[0])
            source = call.inputs[0]
            alone = alone and self._is_read_once(source)
        if source in self._site_of:
            # Where others read the linear's output too, such as other blocks, its rows are not this norm's alone.
            own, site = alone and size_of_value(source) == whole, self._site_of[source]
            return LinearModulation(site, first + shift * width, first + scale * width) if own else None
        if call is None or call.function != "add" or len(call.inputs) != 2:
            return None
        table, shared = None, None
        for operand in call.inputs:
            origin = operand
            while (made := self.trace.producer.get(origin)) and made.function in VIEWS and len(made.inputs) == 1:
                if origin.parameter is not None:
                    break
                origin = made.inputs[0]
            if origin.parameter is not None:
                table = origin.parameter
            else:
                shared = operand
        block = next((name for name in self.blocks if table and table.startswith(f"{name}.")), None)
        if table is None or shared is None or block is None:
            return None
        owner = table.rpartition(".")[0]  # the block, or what stands for it inside
        argument = self._argument(owner, shared)
        return None if argument is None else TableModulation(table, shift, scale, owner, argument)

    def _is_read_once(self, value: Value) -> bool:
        return len(self.trace.consumers.get(value, [])) == 1

    def _argument(self, module: str, value: Value) -> str | None:
        """The name of the module's forward argument that `value` is a view of."""
        arguments = {v: name for name, v in self.trace.module_inputs[module].items() if isinstance(v, Value)}
        while value not in arguments:
            call = self.trace.producer.get(value)
            if call is None or call.function not in VIEWS or len(call.inputs) != 1:
                return None
            value = call.inputs[0]
        return arguments[value]


def _cuts_channels(call: Call) -> bool:
    """Does a split leave all sizes but the last one as they are?"""
    return all(piece.shape[:-1] == call.inputs[0].shape[:-1] for piece in call.outputs)
