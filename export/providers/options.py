"""The options that ONNX Runtime's providers for NVIDIA GPUs are opened with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ditq.export.engine import Engine
from ditq.export.plans.run import user_cache
from ditq.export.plans.sizes import shapes_of, sizes_of
from ditq.export.providers.choice import CUDA, RTX, TENSORRT
from ditq.export.weights_file import WEIGHTS

_PREFIX = {TENSORRT: "trt", RTX: "nv"}


def options_of(provider: str, engine: Engine, graph: str, stream: int) -> dict[str, str]:
    """Of one provider for one graph, in the order of a CUDA stream; of its own for 0."""
    common = {"device_id": str(torch.cuda.current_device())} | ({"user_compute_stream": str(stream)} if stream else {})
    if provider == CUDA:
        # Products that are left in float32 are so because they need its digits, and weights take what they take, no power of 2.
        memory = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
        return {**common, "use_tf32": "0", **memory}
    cache = _cache(engine, graph)
    profile = _profile(_PREFIX[provider], engine, graph)
    if provider == RTX:
        return {
            **common,
            "has_user_compute_stream": str(int(bool(stream))),
            "nv_runtime_cache_path": str(cache),
            **profile,
        }
    kept = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
    kept |= {"trt_engine_cache_path": str(cache), "trt_timing_cache_path": str(cache.parent)}
    return {**common, "trt_fp16_enable": "1", "trt_int8_enable": "1", **kept, **profile}


def _cache(engine: Engine, graph: str) -> Path:
    """Where what TensorRT builds of a graph is kept: for the user, not in the engine.

    Weights lie in a file of their own, and are built in: a graph with other weights is another build.
    """
    both = "-".join(str(engine.files[name]["sha256"]) for name in (graph, WEIGHTS))
    place = user_cache() / "onnxruntime-tensorrt" / hashlib.sha256(both.encode()).hexdigest()
    place.mkdir(parents=True, exist_ok=True)
    return place


def _profile(prefix: str, engine: Engine, graph: str) -> dict[str, str]:
    """The sizes that one build takes, as for a plan (`ditq plan`); without them each new size would be a build of its own."""
    shapes = shapes_of(engine, graph, sizes_of(engine))
    return {
        f"{prefix}_profile_{which}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, three[i]))}" for name, three in shapes.items()
        )
        for i, which in enumerate(("min", "opt", "max"))
    }
