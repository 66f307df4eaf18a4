"""A block that reads what the block before it reads, so that both can run at once.

Of two blocks f and g in a row, whose residual sums are x -> f(x) -> g(f(x)):

    y = x + (f(x) - x) + (g(x) - x) = f(x) + g(x) - x

Source: Grafting (Chandrasegaran et al., arXiv 2506.05340), whose pairs of DiT blocks run so, at half the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn

from ditq.nn.structural import StructuralPart, register

NAME = "parallel"


@register
class ParallelBlock(StructuralPart):
    """A part of the second block of a pair. Both blocks keep their places and names; only what the second reads is another.

    before: the first block of the pair. arguments: the names of all that a block gets, in order; carried: of each thing that it
    returns, the argument that it is the next value of. bare: it returns one tensor alone.
    """

    kind: ClassVar[str] = "parallel_block"
    fitted_by: ClassVar[None] = None

    def __init__(self, before: str, *, arguments: Sequence[str], carried: Sequence[str], bare: bool) -> None:
        super().__init__()
        self.before, self.arguments, self.carried, self.bare = before, list(arguments), list(carried), bare
        self.read: list[Tensor] | None = None  # what the first block gets in the call that runs

    def named(self, positional: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """A block's arguments by name."""
        return dict(zip(self.arguments, positional, strict=False)) | dict(keywords)

    def joined(self, block: Callable[..., Any], given: dict[str, Any]) -> Any:
        """What the pair gives; given: what comes to the second block."""
        if self.read is None:
            raise RuntimeError(f"a block that reads what {self.before} reads was called without that one")
        read, self.read = self.read, None
        made = block(**{**given, **dict(zip(self.carried, read, strict=True))})
        both = zip([given[name] for name in self.carried], [made] if self.bare else made, read, strict=True)
        sums = [first + second - x for first, second, x in both]
        return sums[0] if self.bare else tuple(sums)

    def spec(self) -> dict[str, Any]:
        return {"before": self.before, "arguments": self.arguments, "carried": self.carried, "bare": self.bare}

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        second, _, name = place.rpartition(".")
        if name != NAME or not set(spec["carried"]) <= set(spec["arguments"]):
            raise ValueError(f"{place} is no part of a block, or carries what the block does not get")
        pair(model, second, cls(**spec))


def pair(model: nn.Module, second: str, part: ParallelBlock) -> Callable[[], None]:
    """Let the block `second` of `model` read what the part's first one reads; what undoes it is returned."""
    first, block = model.get_submodule(part.before), model.get_submodule(second)
    block.add_module(NAME, part)
    # Not hooks: those of others, such as a trace's, are to see what comes to a block and what the pair gives.
    first.forward = _First(part, first.forward)
    block.forward = _Second(part, block.forward)

    def undo() -> None:
        del block._modules[NAME]
        for module in (first, block):
            assert isinstance(module.forward, _Around)
            module.forward = module.forward.inner

    return undo


class _Around:
    """Stands for a module's forward. It is copied with its module, to which the copy then belongs."""

    def __init__(self, part: ParallelBlock, inner: Callable[..., Any]) -> None:
        self.part, self.inner = part, inner

    @property
    def __signature__(self) -> Any:
        return signature(self.inner)


class _First(_Around):
    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        given = self.part.named(positional, keywords)
        self.part.read = [given[name] for name in self.part.carried]
        return self.inner(*positional, **keywords)


class _Second(_Around):
    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        return self.part.joined(self.inner, self.part.named(positional, keywords))


def paired(model: nn.Module) -> dict[str, str]:
    """The second block of each pair of `model`, with its first."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, ParallelBlock)}
    return {name.rpartition(".")[0]: part.before for name, part in found.items()}
