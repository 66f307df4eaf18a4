"""Single products for bench_gpu.py, and how calls are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.numerics.carrier import E4M3
from tools.gpu_formats import FORMATS, Float8Linear, coded


def seconds(call: Callable[[], Any], device: torch.device, rounds: int, at_once: int = 1) -> float:
    """The median of `rounds` measurements, on a GPU after two calls to warm up. at_once: calls a measurement, so that the
    GPU does not wait for Python between short ones."""
    for _ in range(2 if device.type == "cuda" else 0):
        call()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(at_once):
                call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(begin.elapsed_time(end) / 1e3 / at_once)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peaks(device: torch.device, size: int) -> dict[str, float]:
    """Measured multiply-adds a second of torch's own products [size, size] x [size, size], by kind of number."""
    x = torch.randn(size, size, device=device)
    q, one = (x * 30).clamp(-127, 127).to(torch.int8), torch.ones(size, 1, device=device)
    f, b = x.to(E4M3), x.to(torch.bfloat16)
    calls: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: b @ b.T,
        "int8": lambda: torch._int_mm(q, q.T),
        "fp8": lambda: torch._scaled_mm(f, f.T, one, one.T.contiguous(), out_dtype=torch.bfloat16, use_fast_accum=True),
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = size**3 / seconds(call, device, 5, at_once=10)
        except (RuntimeError, ValueError) as error:  # no such product here
            print(f"# no {name} product: {str(error).splitlines()[0]}")
    return found


def told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def replayed_seconds(call: Callable[[], Any], device: torch.device, rounds: int, at_once: int = 10) -> float:
    """As `seconds`, of calls recorded as a CUDA graph, so that what Python takes to launch them is not measured."""
    if device.type != "cuda":
        return seconds(call, device, rounds)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(at_once):
            call()
    return seconds(graph.replay, device, rounds) / at_once


def product_rows(device: torch.device, shapes: list[tuple[int, int, int]], rounds: int) -> Iterator[str]:
    """One line a way of each product [M, K] x [K, N]: what torch has, and every way of ditq's, alone."""
    from ditq.kernels.decode import decode_into
    from ditq.kernels.matmul import Product
    from ditq.kernels.product import run_way
    from ditq.kernels.storage import store, store_carrier
    from ditq.kernels.tuning import ways

    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    for tokens, outputs, columns in shapes:
        x = torch.randn(tokens, columns, device=device)
        weight = torch.randn(outputs, columns, device=device) * columns**-0.5
        scale = torch.rand(tokens, device=device) / 30
        numbers = {torch.int8: (x * 30).round().clamp(-127, 127).to(torch.int8), E4M3: x.to(E4M3)}
        dense, half = weight.to(torch.bfloat16), x.to(torch.bfloat16)
        y = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=device)
        full = torch.empty(outputs, columns, dtype=torch.int8, device=device)
        eight = Float8Linear(_linear(weight))
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("torch bf16", partial(F.linear, half, dense)),
            ("torch FP8 rowwise", partial(eight.product, numbers[E4M3], scale[:, None])),
        ]
        for name in ("w8a8", "w4a8", "w3a8", "w8a8 FP8", "w4a8 FP8"):
            code = coded(weight, FORMATS[name])
            stored = store_carrier(code.carrier(), code.scale) if code.bits == 8 else store(code)
            kind = E4M3 if stored.float8 else torch.int8
            product = Product(numbers[kind], scale, stored)
            for way in ways(10 * major + minor, stored.bits, kind, tokens, whole_rows=True):
                calls.append((f"ditq {name} {way}", partial(run_way, way, product, y)))
            if code.bits < 8:
                calls.append((f"ditq {name} written in full, alone", partial(decode_into, stored, full)))
        for name, call in calls:
            try:
                call()
                taken = replayed_seconds(call, device, max(1, rounds // 4))
            except Exception as failed:
                print(f"# {name}: {told(failed)}", flush=True)
                continue
            yield (f"{tokens} x {outputs} x {columns:6d}  {name:52s} {1e3 * taken:9.4f} ms "
                   f"{2e-12 * tokens * outputs * columns / taken:9.1f} TFLOP/s")  # fmt: skip


def _linear(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
