"""NVIDIA GPUs: ditq's own Triton kernels, torch.compile around them, CUDA graphs. Engines hold no graph for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export.arguments import unflatten
from ditq.export.session import first_line
from ditq.export.targets import USUAL, Runner, RunOptions, Target, register
from ditq.export.targets.torch import rebuild
from ditq.nn.structural.scheduled_block import patterns_of
from ditq.numerics.carrier import FLOAT8, INT8

if TYPE_CHECKING:
    from ditq.export.engine import Engine

_LEAST = (8, 0)  # compute capability: the first with int8 and bfloat16 tensor cores that Triton compiles for
_TRITON_OF_10 = (3, 8)  # the first that compiles the kernels which round, for compute capability 10


def available() -> tuple[bool, str]:
    """Whether torch sees a GPU that the kernels compile for, and Triton is there."""
    try:
        import triton
    except ImportError as error:
        return False, f"triton cannot be imported ({error}); pip install 'ditq[cuda]'"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} was built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return False, "torch sees no NVIDIA GPU, or no driver for one; see nvidia-smi"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < _LEAST:
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    if capability[0] == 10 and tuple(map(int, triton.__version__.split(".")[:2])) < _TRITON_OF_10:
        return False, f"{name} needs Triton 3.8 or newer, and this is {triton.__version__}; pip install -U torch triton"
    return True, f"{name}, triton {triton.__version__}"


def check(model: nn.Module) -> None:
    """Raise DitqError for a part of the model that has no kernel."""
    from ditq.kernels.on_gpu import check as check_kernels

    check_kernels(model)
    if len(set(patterns_of(model))) > 1:
        raise DitqError(
            "target 'cuda' captures a call once for all timesteps; set bins: 1 in mob, or compile for another target"
        )


def runner(engine: Engine, options: RunOptions = USUAL) -> Runner:
    """The rebuilt model with its linears as kernels, compiled for the shapes of each first call and replayed afterwards.

    Raises:
        DitqError: a format without a kernel; a model that does not fit in the GPU's memory.
    """
    from ditq.kernels.answered_attention import tell_grids, turns_of
    from ditq.kernels.captured import CapturedCalls
    from ditq.kernels.on_gpu import as_wanted, separate_experts, to_gpu
    from ditq.kernels.traced import compiled

    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    layout = engine.manifest["layout"]
    try:
        model = to_gpu(rebuild(engine), device, 10 * major + minor, options.decoded)
    except torch.cuda.OutOfMemoryError as error:
        raise _too_large(engine, "its weights do not") from error
    if separate := separate_experts(model):
        print(f"note: {engine.name}: {separate}", file=sys.stderr)
    forward = compiled(model)

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        wanted = {name: as_wanted(name, tensor) for name, tensor in inputs.items()}
        return forward(**unflatten(wanted, layout), return_dict=False)[0]

    captured, turns, alone = CapturedCalls(call), turns_of(model), Lock()

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        try:
            # Recorded calls read and write memory of their own, and belong to the GPU that the weights are on.
            with alone, torch.cuda.device(device), torch.no_grad():
                return captured(inputs, *tell_grids(model, unflatten(inputs, layout)), turns.tell(inputs))
        except torch.cuda.OutOfMemoryError as error:
            raise _too_large(engine, "a call of this size does not") from error
        except torch._dynamo.exc.TorchDynamoException as error:
            if isinstance(found := getattr(error, "inner_exception", None), DitqError):
                raise found from error
            raise DitqError(
                f"{engine.name}: torch cannot trace each block as one graph: {first_line(error)}"
            ) from error

    return run


def _too_large(engine: Engine, what: str) -> DitqError:
    free, total = torch.cuda.mem_get_info()
    return DitqError(
        f"{engine.name}: {what} fit in the GPU's memory ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free); "
        "close what else uses it, or ask for smaller or fewer pictures at once"
    )


TARGET = register(
    Target(
        "cuda",
        "NVIDIA GPUs from compute capability 8.0: Triton kernels under torch.compile and CUDA graphs",
        available,
        None,
        runner,
        carriers=(INT8.name, FLOAT8.name),
        device="cuda",
        dtype=torch.bfloat16,
        check=check,
        decodes=True,
    )
)
