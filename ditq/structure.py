"""Find the parts of a diffusion transformer in the record of one forward: what each linear does, what feeds what.

Three questions are answered by walking the dataflow: what a linear's input comes from (attention, activation, norm with
modulation), where its output goes (scores, values, a broadcast over tokens), and whether only reshapes lie between.
"""

from __future__ import annotations

import itertools
from functools import cached_property

from torch import nn
from torch.utils._pytree import tree_leaves

from ditq.carried import carried_by
from ditq.dataflow import ACTIVATIONS, ATTENTION, VIEWS, size_of, size_of_value
from ditq.feeds import Feeds
from ditq.parts import (
    Attention,
    Block,
    ChannelRange,
    FeedForward,
    InputGroup,
    LinearSite,
    Role,
)
from ditq.trace import Call, Trace, Value


class Structure(Feeds):
    """The typed views of `model`, read off `trace`. `batch` is the batch size of the traced inputs."""

    def __init__(self, model: nn.Module, trace: Trace, batch: int) -> None:
        super().__init__(model, trace)
        self.batch = batch
        self.blocks = self._find_blocks()
        self._block_of = {site: block.name for block in self.blocks.values() for site in block.sites}
        self.attentions = self._find_attentions()
        self.feed_forwards = self._find_feed_forwards()
        self.groups = self._find_groups()
        self.sites = self._find_sites()

    # --- blocks

    def _find_blocks(self) -> dict[str, Block]:
        blocks: dict[str, Block] = {}
        for stack, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList) or any(stack.startswith(f"{name}.") for name in blocks):
                continue
            names = [f"{stack}.{index}" for index, _ in enumerate(module)]
            carried = carried_by(self.trace, names)
            for name in names:
                sites = tuple(site for site in self.calls if site.startswith(f"{name}."))
                if len(sites) > 1:
                    blocks[name] = Block(name, stack, sites, carried.get(name))
        return blocks

    # --- attention

    def _readers_of_attention(self, call: Call) -> tuple[list[ChannelRange], bool]:
        """Linears that read an attention's output through views, with the channels where it arrives."""
        found: list[ChannelRange] = []
        pure, pending = True, [(call.outputs[0], 0)]
        width = call.outputs[0].shape[1] * call.outputs[0].shape[-1]
        while pending:
            value, start = pending.pop()
            for reader in self.trace.consumers.get(value, []):
                if reader.function == "linear" and reader.module in self.linears:
                    found.append(ChannelRange(reader.module, start, start + width))
                elif reader.function == "cat" and self._along_channels(reader):
                    before = [v for v in reader.inputs[: reader.inputs.index(value)]]
                    pending.append((reader.outputs[0], start + sum(v.shape[-1] for v in before)))
                elif reader.function in ("split", "split_with_sizes") and self._along_channels(reader, 2):
                    for output in reader.outputs:
                        if start < output.shape[-1] and start + width > 0:
                            pending.append((output, start))
                        start -= output.shape[-1]
                elif reader.function in VIEWS:
                    pending.extend((output, start) for output in reader.outputs)
                else:
                    pure = False
        return found, pure and bool(found)

    # --- attention and feed-forward

    def _find_attentions(self) -> dict[str, Attention]:
        found: dict[str, Attention] = {}
        for call in self.trace.calls:
            if call.function not in ATTENTION:
                continue
            query, key, value = (call.argument(i, name) for i, name in enumerate(("query", "key", "value")))
            values, pure_in = self._linears_behind(value, pure=True)
            outputs, pure_out = self._readers_of_attention(call)
            heads, width = value.shape[1], value.shape[-1]
            whole = all(self.linears[site].out_features == heads * width for site in values)
            same_heads = call.outputs[0].shape[1] == heads
            part = call.keywords.get("part")
            module = call.module if part is None else part.site
            name = module if module not in found else f"{module}#{len(found)}"
            found[name] = Attention(
                name=name,
                heads=call.outputs[0].shape[1],
                head_width=width,
                queries=tuple(self._linears_behind(query, pure=False)[0]),
                keys=tuple(self._linears_behind(key, pure=False)[0]),
                values=tuple(values),
                outputs=tuple(sorted(set(outputs), key=lambda o: (o.site, o.start))),
                foldable=bool(values)
                and pure_in
                and pure_out
                and whole
                and same_heads
                and call.function != "channel_attention"
                and self._feeds_only(call, values),
                macs=self._macs_of_attention(call),
                module=module,
                plain=not call.argument(5, "is_causal", False) and query.shape[:2] == key.shape[:2],
                tokens=query.shape[-2],
                to_each_other=query.shape == key.shape and call.argument(3, "attn_mask") is None,
            )
        return found

    @staticmethod
    def _macs_of_attention(call: Call) -> int:
        """Of one sample: q k^T and p v, or what a structural part says."""
        if "part" in call.keywords:
            return int(call.keywords["part"].macs(call.keywords["grid"]))
        query, key = (call.argument(i, name) for i, name in enumerate(("query", "key")))
        return 2 * call.outputs[0].shape[1] * query.shape[-2] * key.shape[-2] * call.outputs[0].shape[-1]

    def _feeds_only(self, attention: Call, values: list[str]) -> bool:
        """Do the value linears' outputs go nowhere but into this attention?"""
        pending = [self.calls[site].outputs[0] for site in values]
        while pending:
            for reader in self.trace.consumers.get(pending.pop(), []):
                if reader.function in VIEWS:
                    pending.extend(reader.outputs)
                elif reader is not attention:
                    return False
        return True

    def _find_feed_forwards(self) -> dict[str, FeedForward]:
        found: dict[str, FeedForward] = {}
        for site, call in self.calls.items():
            if site not in self._block_of or not self._sees_tokens(call):
                continue
            pieces = [(self._source(call.inputs[0]), 0)]
            producer = self.trace.producer.get(pieces[0][0])
            if producer is not None and producer.function == "cat" and self._along_channels(producer):
                starts = [sum(v.shape[-1] for v in producer.inputs[:i]) for i in range(len(producer.inputs))]
                pieces = list(zip(producer.inputs, starts, strict=True))
            for value, start in pieces:
                inputs, activation = self._activated(value)
                inputs = [name for name in inputs if self._block_of.get(name) == self._block_of[site]]
                if activation and inputs:
                    target = ChannelRange(site, start, start + value.shape[-1])
                    module = self._does_only(inputs, site)
                    alone = "" if module or len(inputs) > 1 else self._activates_only(value)
                    found[site] = FeedForward(site, tuple(inputs), target, activation, module, alone)
        return found

    def _does_only(self, inputs: list[str], output: str) -> str:
        """The module around these linears, if all that is called in it makes the one's input of the others' outputs; else
        nothing.
        """
        module = _common_module([*inputs, output])
        while isinstance(self.model.get_submodule(module), nn.ModuleList | nn.ModuleDict):
            module = module.rpartition(".")[0]
        given = self.trace.module_inputs.get(module, {})
        if module in self.blocks or not module or len([v for v in tree_leaves(given) if isinstance(v, Value)]) != 1:
            return ""
        for call in self.trace.calls:
            if call.module != module and not call.module.startswith(f"{module}."):
                continue
            if call.function == "linear" and call.module not in (*inputs, output):
                return ""
            if call.function not in {"linear", "mul"} | VIEWS | ACTIVATIONS:
                return ""
        return module

    def _activates_only(self, value: Value) -> str:
        """The leaf module whose calls make `value` of a linear's output, if it does nothing else; else nothing."""
        call = self.trace.producer.get(self._source(value))
        if call is None or call.module in self.blocks or list(self.model.get_submodule(call.module).children()):
            return ""
        inside = [other for other in self.trace.calls if other.module == call.module]
        given = [v for other in inside for v in other.inputs if not any(v in made.outputs for made in inside)]
        known = all(other.function in {"mul"} | VIEWS | ACTIVATIONS for other in inside)
        return call.module if known and len(set(given)) == 1 and given[0] in self._site_of else ""

    def _activated(self, value: Value) -> tuple[list[str], str]:
        """Linears from which `value` is made through an activation, views and products alone; and which activation."""
        found, activation, pending = [], "", [value]
        while pending:
            value = pending.pop()
            call = self.trace.producer.get(value)
            if value in self._site_of:
                found.append(self._site_of[value])
            elif call is not None and (
                call.function in VIEWS or call.function in ACTIVATIONS or call.function == "mul"
            ):
                activation = call.function if call.function in ACTIVATIONS else activation
                pending.extend(call.inputs)
        order = list(self.calls)
        return sorted(set(found), key=order.index), activation

    # --- groups and what feeds them

    def _find_groups(self) -> dict[str, InputGroup]:
        members: dict[Value, list[str]] = {}
        for site, call in self.calls.items():
            members.setdefault(self._rows_behind(self._source(call.inputs[0])), []).append(site)
        groups = {}
        for value, sites in members.items():
            only_these = all(c.function == "linear" and c.module in sites for c in self._readers_of_rows(value))
            # What a linear reads in another call comes from elsewhere: CogView4's feed-forwards see picture and text in turn.
            feed = self._feed_of(value) if only_these and self.repeated.isdisjoint(sites) else None
            groups[sites[0]] = InputGroup(sites[0], tuple(sites), value.shape[-1], feed)
        return groups

    # --- sites

    @cached_property
    def _last_block_call(self) -> int:
        return max((self.calls[site].index for site in self._block_of), default=-1)

    def _role(self, site: str, call: Call) -> Role:
        inside = site in self._block_of
        if self._sees_tokens(call):
            if inside:
                return "token"
            return "final" if call.index > self._last_block_call else "embedder"
        broadcast = self._broadcast_over_tokens(call)
        if broadcast is None:
            return "embedder"
        return "modulation" if any(broadcast.module.startswith(name) for name in self.blocks) else "final"

    def _broadcast_over_tokens(self, call: Call) -> Call | None:
        """The first product or sum in which the output of this vector linear meets tokens; None if it feeds a linear.

        A linear that gets it unchanged is the second half of one in two factors, and looked through.
        """
        pending, met = [call.outputs[0]], None
        while pending:
            value = pending.pop(0)
            for reader in self.trace.consumers.get(value, []):
                if reader.function == "linear" and self._source(value) != call.outputs[0]:
                    return None
                output = reader.outputs[0]
                if reader.function in ("add", "mul", "addcmul", "sub") and size_of_value(output) > 2 * size_of_value(
                    value
                ):
                    met = met or reader
                elif len(pending) < 256:
                    pending.extend(reader.outputs)
        return met

    @cached_property
    def _made_of(self) -> dict[Value, frozenset[str]]:
        """The arguments of the model's forward from which each value is made."""
        made: dict[Value, frozenset[str]] = {}
        for argument, given in self.trace.module_inputs[""].items():
            made.update({leaf: frozenset([argument]) for leaf in tree_leaves(given) if isinstance(leaf, Value)})
        for call in self.trace.calls:
            read = frozenset[str]().union(*(made.get(value, frozenset()) for value in call.inputs))
            made.update(dict.fromkeys(call.outputs, read))
        return made

    def _arguments_of(self, value: Value) -> tuple[str, ...]:
        return tuple(sorted(self._made_of.get(value, ())))

    def _kinds(self) -> dict[str, str]:
        kinds: dict[str, list[str]] = {}
        for attention in self.attentions.values():
            named = [(site, "query") for site in attention.queries] + [(site, "key") for site in attention.keys]
            named += [(site, "value") for site in attention.values]
            named += [(output.site, "attention_out") for output in attention.outputs]
            for site, kind in named:
                if site in self._block_of and kind not in kinds.setdefault(site, []):
                    kinds[site].append(kind)
        for feed_forward in self.feed_forwards.values():
            for site in feed_forward.inputs:
                kinds.setdefault(site, []).append("feed_forward_in")
            kinds.setdefault(feed_forward.output.site, []).append("feed_forward_out")
        for site, call in self.calls.items():
            if any(reader.function in ("topk", "sort") for reader in self._readers_of_scores(call.outputs[0])):
                kinds.setdefault(site, []).append("router")
        return {site: "+".join(dict.fromkeys(names)) for site, names in kinds.items()}

    def _find_sites(self) -> dict[str, LinearSite]:
        kinds = self._kinds()
        group_of = {site: group.name for group in self.groups.values() for site in group.sites}
        sites: dict[str, LinearSite] = {}
        for name, linear in self.linears.items():
            call = self.calls.get(name)
            role: Role = "unused" if call is None else self._role(name, call)
            tokens = 0 if call is None else max(1, size_of(call.inputs[0].shape[:-1]) // self.batch)
            kind = kinds.get(name, "") if role == "token" else ""
            sites[name] = LinearSite(
                name, linear.in_features, linear.out_features, role, kind, self._block_of.get(name),
                group_of.get(name, name), tokens, () if call is None else self._arguments_of(call.inputs[0]),
            )  # fmt: skip
        return sites


def _common_module(names: list[str]) -> str:
    """The deepest module that holds all of them."""
    paths = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in shared)
