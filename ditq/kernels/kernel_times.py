"""What kernels a call runs on the GPU, how long each takes, and what kind of work it does, told by its name."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

RUNS = 3

_FUSED = re.compile(
    r"^triton_(poi|red|per)_fused"
)  # torch's compiler lists in such a name whatever is near, products too
_OF_FUSED = (
    ("attention", re.compile(r"_softmax")),
    ("quantization", re.compile(r"amax|quantize", re.IGNORECASE)),
)
_KERNELS = (  # what GPU kernels of a kind are called, the first that fits
    ("attention", re.compile(r"flash|fmha|mha|sdpa|attention|softmax", re.IGNORECASE)),
    ("quantization", re.compile(r"quantize|QuantizeLinear", re.IGNORECASE)),
    (
        "products",
        re.compile(r"gemm|gemv|matmul|cutlass|cublas|xmma|nvjet|imma|conv|decode|product|triton_tem", re.IGNORECASE),
    ),
)


def kind_of_kernel(name: str) -> str:
    """Of a GPU's kernel. A rotation is part of ditq's own quantization, and a product like others in other runtimes."""
    patterns = _OF_FUSED if _FUSED.match(name) else _KERNELS
    return next((kind for kind, pattern in patterns if pattern.search(name)), "rest")


def kernel_times(call: Callable[[], object], runs: int = RUNS) -> list[tuple[str, float]]:
    """(name, microseconds) of each kernel of some calls, by torch's profiler, which sees those of all libraries of the process.

    A first call is not counted.
    """
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(runs):
            call()
        torch.cuda.synchronize()
    return [(event.key, event.self_device_time_total) for event in found.key_averages()]
