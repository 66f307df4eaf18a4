"""Plain torch: the diffusers model rebuilt around the engine's QuantLinears. The exact meaning; slow."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export.arguments import unflatten
from ditq.export.session import first_line
from ditq.export.targets import USUAL, Runner, RunOptions, Target, register
from ditq.export.weights_file import EXTRA, WEIGHTS
from ditq.nn import rebuild as nn_rebuild
from ditq.nn.structural.held_tiles import Turns
from ditq.nn.structural.token_attention import token_attentions

if TYPE_CHECKING:
    from ditq.export.engine import Engine


def rebuild(engine: Engine) -> nn.Module:
    """The model that the engine was compiled from, float32, in eval mode.

    Raises:
        DitqError: its class is not in this diffusers, or its weights do not fit the class.
    """
    import diffusers
    from accelerate import init_empty_weights

    class_name = engine.manifest["class_name"]
    builder: Any = getattr(diffusers, class_name, None)
    if builder is None:
        raise DitqError(
            f"{engine.folder}: the class {class_name} is not in diffusers {diffusers.__version__}; upgrade it"
        )
    stored = load_file(engine.folder / WEIGHTS)
    state = {name: _widened(tensor) for name, tensor in stored.items() if not name.startswith(EXTRA)}
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = builder.from_config(engine.config)
        nn_rebuild(model, engine.manifest["structure"], state)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DitqError(f"{engine.folder}: its weights do not fit {class_name}: {first_line(error)}") from error
    return model.eval().requires_grad_(False)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def available() -> tuple[bool, str]:
    """Whether diffusers can be imported."""
    try:
        import diffusers
    except ImportError as error:
        return False, f"diffusers cannot be imported ({error}); pip install diffusers"
    return True, f"torch {torch.__version__}, diffusers {diffusers.__version__}"


def runner(engine: Engine, options: RunOptions = USUAL) -> Runner:
    """Calls the rebuilt model. Threads are torch's own setting for the whole process, so they are left alone."""
    model = rebuild(engine)
    turns, alone = Turns(token_attentions(model).values()), Lock()

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        # The parts are told which step a call is for, so calls wait for each other. Not in inference mode, whose tensors refuse
        # what a caller does to them in place; and exact where the caller's own layers are not.
        with alone, torch.no_grad(), torch.autocast("cpu", enabled=False):
            turns.tell(inputs)
            return model(**unflatten(inputs, engine.manifest["layout"]), return_dict=False)[0]

    return run


TARGET = register(Target("torch", "plain torch, the exact meaning", available, None, runner))
