"""What blocks get and give while the model runs: outputs of the untouched model on disk, inputs of the present one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditq.calibration.batches import CallBatch

Call = tuple[tuple[Any, ...], dict[str, Any]]


class BlockOutputs:
    """The outputs of blocks on each batch of calls, in a folder of its own that goes when this object does."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ditq-blocks-")

    def _file(self, block: str, number: int) -> Path:
        return Path(self._folder.name) / f"{block or 'model'}-{number}.safetensors"

    def put(self, block: str, number: int, outputs: Sequence[Tensor]) -> None:
        """Keep what `block` gave for the batch of that number."""
        save_file({str(i): tensor.contiguous() for i, tensor in enumerate(outputs)}, self._file(block, number))

    def get(self, block: str, number: int) -> list[Tensor]:
        """What was kept, in the same order."""
        found = load_file(self._file(block, number))
        return [found[str(i)] for i in range(len(found))]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a block's output, whatever they are wrapped in."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for item in output for tensor in tensors_of(item)] if isinstance(output, (list, tuple)) else []


@torch.no_grad()
def record_outputs(model: nn.Module, blocks: Sequence[str], number: int, batch: CallBatch, kept: BlockOutputs) -> None:
    """Run the model on one batch of calls and keep what each of the blocks gives; "" is the model itself."""

    def keeping(name: str) -> Any:
        return lambda module, inputs, output: kept.put(name, number, tensors_of(output))

    hooks = [model.get_submodule(name).register_forward_hook(keeping(name)) for name in blocks]
    try:
        call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def call(model: nn.Module, batch: CallBatch) -> Any:
    """The model's answer to a batch of recorded calls."""
    return model(**{**batch.arguments, "return_dict": False})


class _Reached(Exception):
    """The block has its input; the rest of the model need not run."""


@torch.no_grad()
def block_inputs(model: nn.Module, block: str, batches: Sequence[CallBatch]) -> Iterator[Call]:
    """The arguments that `block` gets for each batch from the model as it is now."""
    if not block:
        yield from (((), {**batch.arguments, "return_dict": False}) for batch in batches)
        return
    for batch in batches:
        with _first_input(model.get_submodule(block)) as found, suppress(_Reached):
            call(model, batch)
        yield found[0]


@contextmanager
def _first_input(module: nn.Module) -> Iterator[list[Call]]:
    found: list[Call] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append((arguments, keywords))
        raise _Reached

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
