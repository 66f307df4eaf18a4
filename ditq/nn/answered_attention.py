"""How a part answers for scaled_dot_product_attention, wherever its module calls it.

All attentions of diffusers end in that function of torch, whichever processor prepares their queries, keys and values. So
nothing of the module is replaced: while its forward runs, the call is answered by the part instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AnswersAttention(nn.Module, ABC):
    """A part of an attention module that computes the attention in torch's stead."""

    what = "answered"  # what becomes of the attention, in a word, for errors

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.running: list[TorchFunctionMode] = []

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """What softmax(q k^T scale + mask) v is taken to be: query [B, h, N, d], key and value [B, h, M, d] -> [B, h, N, d].

        `scale` is None for 1/sqrt(d).
        """


def answer(attention: nn.Module, name: str, part: AnswersAttention) -> Callable[[], None]:
    """Let `part`, from now on a child `name` of `attention`, answer for it; one part a module. What undoes it is returned."""
    attention.add_module(name, part)
    hooks = [
        attention.register_forward_pre_hook(_enter),
        attention.register_forward_hook(_leave, always_call=True),
    ]

    def undo() -> None:
        delattr(attention, name)
        for hook in hooks:
            hook.remove()

    return undo


def unanswer(attention: nn.Module) -> None:
    """Let no part answer for `attention` any more."""
    for name, child in list(attention.named_children()):
        if isinstance(child, AnswersAttention):
            delattr(attention, name)
    for hooks in (attention._forward_pre_hooks, attention._forward_hooks):
        for number, hook in list(hooks.items()):
            if hook in (_enter, _leave):
                del hooks[number]


def answering(attention: nn.Module) -> AnswersAttention | None:
    """The part that answers for a module, if there is one."""
    return next((child for child in attention.children() if isinstance(child, AnswersAttention)), None)


# The hooks find the part on the module that runs, so that a copy of a model has parts of its own.


def _enter(attention: nn.Module, _: Any) -> None:
    part = answering(attention)
    if part is not None:
        mode = _Intercept(part)
        mode.__enter__()
        part.running.append(mode)


def _leave(attention: nn.Module, _: Any, __: Any) -> None:
    part = answering(attention)
    if part is not None and part.running:  # none where an earlier hook failed
        part.running.pop().__exit__(None, None, None)


class _Intercept(TorchFunctionMode):
    """Hands calls of scaled_dot_product_attention to a part."""

    def __init__(self, part: AnswersAttention) -> None:
        super().__init__()
        self.part = part

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        if given.get("is_causal") or given.get("dropout_p"):
            raise ValueError(
                f"{self.part.site}: attention is {self.part.what} only if it is neither causal nor with dropout"
            )
        query, key, value = (given[name] for name in _ARGUMENTS[:3])
        return self.part(query, key, value, given.get("attn_mask"), given.get("scale"))
