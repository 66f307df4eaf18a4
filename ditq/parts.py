"""The parts of a diffusion transformer that ditq names: linear sites, input groups, what feeds them, attentions, blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["token", "modulation", "embedder", "final", "unused"]


@dataclass(frozen=True)
class LinearModulation:
    """shift and scale are rows of a modulation linear's output: x = norm(z) * (1 + scale) + shift.

    `shift` and `scale` are the first rows of each in that linear's weight; each spans the width of the group.
    """

    site: str
    shift: int
    scale: int


@dataclass(frozen=True)
class TableModulation:
    """shift and scale are rows of a block's own table added to a vector that all blocks share (adaLN-single).

    `table` is the parameter [.., rows, width]; `argument` the block's forward argument that carries the shared vector.
    """

    table: str
    shift: int
    scale: int
    block: str
    argument: str


@dataclass(frozen=True)
class NormModulation:
    """The group reads a norm with its own weight and bias: x = norm(z) * weight + bias."""

    weight: str
    bias: str | None


Feed = LinearModulation | TableModulation | NormModulation


@dataclass(frozen=True)
class LinearSite:
    """One nn.Linear of the model. `macs` and `tokens` are for one sample of the example inputs.

    Those that see tokens have a kind; a `router` chooses experts for them.
    `arguments` are those of the model's forward that the linear's input is made of.
    """

    name: str
    in_features: int
    out_features: int
    role: Role
    kind: str
    block: str | None
    group: str
    tokens: int
    arguments: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def macs(self) -> int:
        return self.tokens * self.parameters


@dataclass(frozen=True)
class InputGroup:
    """All linears that read the very same tensor, named for the first of them.

    `feed` is the norm and modulation that make this tensor and nothing else reads it; None where scale or shift of the
    tensor cannot be folded into what comes before.
    """

    name: str
    sites: tuple[str, ...]
    width: int
    feed: Feed | None


@dataclass(frozen=True)
class ChannelRange:
    """Channels [start, stop) of a linear's input."""

    site: str
    start: int
    stop: int


@dataclass(frozen=True)
class Attention:
    """Softmax attention: `outputs` are the linears that read it, with the channels in which they do.

    `foldable`: only reshapes and concatenations of tokens lie between the value linears and the score product and between
    it and the outputs, so an orthogonal matrix a head can be moved from one to the other. `module`: where it is called;
    `plain`: neither causal nor with fewer heads of keys than of queries; `tokens`: queries of the example; `to_each_other`:
    whether keys are of the same tokens, as many, and no mask hides any.
    """

    name: str
    heads: int
    head_width: int
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    outputs: tuple[ChannelRange, ...]
    foldable: bool
    macs: int
    module: str = ""
    plain: bool = True
    tokens: int = 0
    to_each_other: bool = True


@dataclass(frozen=True)
class FeedForward:
    """inputs -> activation -> output, with the channels of the output linear's input that it fills.

    `module` is the one that does this and nothing else, if there is one; else `activation_module` is one that only turns what
    the one input linear gives into the hidden channels, if there is such a one.
    """

    name: str
    inputs: tuple[str, ...]
    output: ChannelRange
    activation: str
    module: str = ""
    activation_module: str = ""

    @property
    def hidden(self) -> int:
        """Hidden channels."""
        return self.output.stop - self.output.start


@dataclass(frozen=True)
class Carried:
    """What a block hands on: its arguments in order, the argument that each tensor it returns is the next value of, their
    widths, and whether it returns one tensor alone.
    """

    arguments: tuple[str, ...]
    names: tuple[str, ...]
    widths: tuple[int, ...]
    bare: bool


@dataclass(frozen=True)
class Block:
    """One item of a repeated stack. `carried`: what it would hand on if it were left out; None if the model needs it."""

    name: str
    stack: str
    sites: tuple[str, ...]
    carried: Carried | None = None


Part = Literal["token linears", "feed-forward", "attention scores", "modulation", "rest"]


@dataclass(frozen=True)
class Work:
    """What a linear, an attention or what stands in its place costs in one call of the denoiser, for one sample.

    `macs`: multiply-adds. `parameters`: numbers in memory. `activated`: those of them that one token passes through; fewer than
    all where tokens are sent to some experts only. `moved`: numbers of activations read and written. `operations`: kernels that
    are started.
    """

    part: Part
    macs: int
    parameters: int = 0
    activated: int = 0
    moved: int = 0
    operations: int = 1

    @classmethod
    def of_linear(cls, part: Part, tokens: int, inputs: int, outputs: int) -> Work:
        """A linear [outputs, inputs] over so many tokens."""
        weights = inputs * outputs
        return cls(part, tokens * weights, weights, weights, tokens * (inputs + outputs))

    @classmethod
    def of_site(cls, site: LinearSite) -> Work:
        """A linear of the model as it came."""
        part: Part = "rest"
        if site.role == "modulation":
            part = "modulation"
        elif site.role == "token":
            part = "feed-forward" if "feed_forward" in site.kind else "token linears"
        return cls.of_linear(part, site.tokens, site.in_features, site.out_features)

    @classmethod
    def of_attention(cls, queries: int, keys: int, width: int) -> Work:
        """Softmax attention of so many queries to so many keys each, all heads together `width` channels, as one fused kernel:
        Q K^T and P V, section 3.2.1 of Vaswani et al., arXiv 1706.03762.
        """
        return cls("attention scores", 2 * queries * keys * width, moved=2 * (queries + keys) * width)
