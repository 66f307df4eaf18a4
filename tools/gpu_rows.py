"""The rows of bench_gpu.py: a whole model in one format each, compiled block by block and replayed as a CUDA graph."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditq.kernels.answered_attention import answers_of
from ditq.kernels.blocks import Forward, in_blocks
from ditq.kernels.captured import CapturedCalls
from ditq.kernels.kernel_times import kernel_times, kind_of_kernel
from ditq.kernels.on_gpu import to_gpu
from ditq.kernels.traced import Compiler, compiled, inductor
from ditq.nn import attention_rounding
from ditq.nn.attention_rounding import watched
from ditq.nn.structural.linear_attention import LinearAttention
from ditq.nn.structural.local_attention import LocalAttention
from ditq.nn.structural.sparse_attention import SparseAttention
from ditq.nn.structural.token_attention import attach
from ditq.numerics.attention_rounding import FLOAT8 as E4M3
from ditq.numerics.attention_rounding import PARTS, AttentionFormat
from ditq.numerics.carrier import FLOAT8
from ditq.numerics.token_layout import TokenLayout
from ditq.numerics.token_order import TokenOrder
from ditq.numerics.window import Window
from tools.gpu_formats import FORMATS, Float8Linear, Format, Int8Linear, quantize, with_linears
from tools.gpu_models import Attention, Denoiser, Shape, inputs_of, multiply_adds
from tools.gpu_products import seconds, told

Call = Callable[[Mapping[str, Tensor]], Tensor]
BASE = "bf16 compiled"  # what the others' speed is measured by
KINDS = ("products", "attention", "quantization", "decode", "rest")
ATTENTIONS: dict[str, tuple[type[LocalAttention] | type[LinearAttention] | type[SparseAttention], dict[str, Any]]] = {
    "window 8": (LocalAttention, {"window": Window("circle", 8, 8)}),
    "window 8 in order": (LocalAttention, {"window": Window("circle", 8, 8)}),
    "window 16": (LocalAttention, {"window": Window("circle", 16, 8)}),
    "linear attention": (LinearAttention, {"features": "softmax"}),
    "9 tiles of 16": (SparseAttention, {"tile": 16, "keep": 9, "means": True}),
}
IN_ORDER = " in order"  # of tokens tile by tile in the whole model
AND_ATTENTION = "and FP8 attention"
DECODED = "decoded"  # weights, at load


@dataclass(frozen=True)
class Row:
    """What one variant took.

    speed: times as fast as `bf16 compiled`; share: of the peak of its numbers; kinds: shares of the time on the GPU, in the
    order of KINDS; error: ||difference|| / ||output|| from float32 with the weights as they were.
    """

    shape: str
    variant: str
    milliseconds: float
    speed: float
    teraflops: float
    share: float
    gigabytes: float
    kinds: tuple[float, ...] | None
    error: float

    HEAD = (
        f"{'shape':14s} {'variant':40s} {'ms':>9s} {'speed':>7s} {'TFLOP/s':>9s} {'of peak':>8s} {'GB':>7s} "
        f"{'prod/att/quan/dec/rest':>23s} {'error':>9s}"
    )

    def __str__(self) -> str:
        kinds = "-" if self.kinds is None else "/".join(f"{100 * share:.1f}" for share in self.kinds)
        return (
            f"{self.shape:14s} {self.variant:40s} {self.milliseconds:9.3f} {self.speed:6.2f}x {self.teraflops:9.1f} "
            f"{self.share:8.1%} {self.gigabytes:7.2f} {kinds:>23s} {self.error:9.2e}"
        )


@dataclass(frozen=True)
class Variant:
    """number: the numbers that its products multiply; make: what is called, of a bfloat16 model on the device."""

    number: str
    make: Callable[[Denoiser], Call]


def variants(shape: Shape, device: torch.device, inner: Compiler, mode: str) -> dict[str, Variant]:
    """Those of a shape by name. For large pictures attention is what varies. mode: of torch.compile on a GPU."""
    on_gpu = device.type == "cuda"

    def captured(forward: Forward) -> Call:
        def call(given: Mapping[str, Tensor]) -> Tensor:
            made: Tensor = forward(**given)
            return made

        return CapturedCalls(call) if on_gpu else call

    def torch_compiled(model: nn.Module) -> Call:
        options: dict[str, Any] = {"mode": mode} if on_gpu else {"backend": "eager"}
        return captured(
            in_blocks(model, lambda _, block: torch.compile(block, dynamic=False, fullgraph=True, **options))
        )

    def ours(form: Format, attention: str = "", decoded: bool = False) -> Callable[[Denoiser], Call]:
        def make(model: Denoiser) -> Call:
            capability = None
            if on_gpu:
                major, minor = torch.cuda.get_device_capability(device)
                capability = 10 * major + minor
            if attention == AND_ATTENTION:
                round_attention(model, device)
            elif attention:
                put_attention(model, attention)
            fast = to_gpu(quantize(model, form, device), device, capability, decoded)
            for answer in answers_of(fast).values():
                answer.part.grid = replace(shape.grid, order=answer.part.layout.order)
            return captured(compiled(fast, inner))

        return make

    def eager(model: Denoiser) -> Call:
        return lambda given: model(**given)

    float8 = Variant("fp8", lambda model: torch_compiled(with_linears(model, Float8Linear)))
    if shape.large:
        found = {BASE: Variant("bf16", torch_compiled), "FP8 rowwise compiled": float8}
        found["ditq w4a8"] = Variant("int8", ours(FORMATS["w4a8"]))
        for name in ATTENTIONS:
            found[f"ditq w4a8 {name}"] = Variant("int8", ours(FORMATS["w4a8"], name))
        return found
    found = {
        "bf16 eager": Variant("bf16", eager),
        BASE: Variant("bf16", torch_compiled),
        "FP8 rowwise compiled": float8,
    }
    found["int8 dynamic compiled"] = Variant("int8", lambda model: torch_compiled(with_linears(model, Int8Linear)))
    for name, form in FORMATS.items():
        number = "bf16" if form.activation.granularity == "none" else "fp8" if form.carrier is FLOAT8 else "int8"
        found[f"ditq {name}"] = Variant(number, ours(form))
    for name, number in (("w4a8", "int8"), ("w4a8 FP8", "fp8")):
        found[f"ditq {name} {DECODED}"] = Variant(number, ours(FORMATS[name], decoded=True))
        found[f"ditq {name} {AND_ATTENTION}"] = Variant(number, ours(FORMATS[name], AND_ATTENTION))
        found[f"ditq {name} {DECODED} {AND_ATTENTION}"] = Variant(number, ours(FORMATS[name], AND_ATTENTION, True))
    return found


def put_attention(model: Denoiser, name: str) -> None:
    """One of ATTENTIONS in the place of each attention of the model."""
    kind, settings = ATTENTIONS[name]
    shape, layout = model.shape, TokenLayout(order=TokenOrder("windows") if name.endswith(IN_ORDER) else None)
    for site, module in list(model.named_modules()):
        if isinstance(module, Attention):
            attach(model, kind(site, layout, shape.heads, shape.width // shape.heads, shape.text > 0, 0, **settings))


def round_attention(model: Denoiser, device: torch.device) -> None:
    """FP8 attention, with static scales of what the model's attentions get."""
    sites = [site for site, module in model.named_modules() if isinstance(module, Attention)]
    with torch.no_grad(), watched(model, sites, rotate=True) as found:
        model(**inputs_of(model.shape, device, torch.bfloat16))
    for site, part in found.items():
        form = AttentionFormat(E4M3, PARTS, False, part.scales(E4M3, 4.0), rotate=True)
        attention_rounding.attach(model.get_submodule(site), site, form)


def reference(shape: Shape, device: torch.device) -> Tensor:
    """The output in float32, brought to the CPU."""
    model = generated(shape, device, torch.float32)
    with torch.no_grad():
        return model(**inputs_of(shape, device, torch.float32)).float().cpu()


def generated(shape: Shape, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """The model, with the same weights for each dtype: those of bfloat16."""
    with torch.device("meta"):
        model = Denoiser(shape).to(torch.bfloat16)
    return model.to_empty(device=device).generate().to(dtype)


def rows(
    shape: Shape,
    device: torch.device,
    only: list[str],
    peak: Mapping[str, float],
    rounds: int,
    inner: Compiler = inductor,
    mode: str = "default",
) -> Iterator[Row]:
    """A row a variant, each made anew from the same generated weights. Large pictures are not compared with float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = None if shape.large else reference(shape, device)
    inputs = inputs_of(shape, device, torch.bfloat16)
    base = float("nan")
    for name, variant in variants(shape, device, inner, mode).items():
        if only and not any(part[1:] == name if part.startswith("=") else part in name for part in only):
            continue
        _forget(device)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                model = generated(shape, device, torch.bfloat16)
                linear, attention = multiply_adds(model)
                call = variant.make(model)
                model = None  # type: ignore[assignment]
                found = call(inputs).float().cpu()
                print(f"# {shape.name} {name}: first call after {time.perf_counter() - start:.0f} s", flush=True)
                if device.type == "cuda":  # what calls need, not what making the model took
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                taken = seconds(partial(call, inputs), device, rounds)
                memory = _gigabytes(device)
                kinds = _kinds(partial(call, inputs)) if device.type == "cuda" else None
        except Exception as failed:  # one variant that a machine has not must not cost the others' rows
            print(f"# {shape.name} {name}: {told(failed)}", flush=True)
            model = call = None  # type: ignore[assignment]  # what failed must not take the next one's memory
            continue
        base = taken if name == BASE else base
        dense = not any(name.endswith(kind) for kind in ATTENTIONS)  # others' multiply-adds cannot be compared
        rate = (linear + attention) / taken if dense else float("nan")
        share = rate / peak[variant.number] if variant.number in peak else float("nan")
        error = float("nan") if expected is None else float((found - expected).norm() / expected.norm())
        yield Row(shape.name, name, 1e3 * taken, base / taken, 2e-12 * rate, share, memory, kinds, error)
        call = None  # type: ignore[assignment]


def _forget(device: torch.device) -> None:
    """Let go of the variant before, whose compiled blocks refer to each other."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _gigabytes(device: torch.device) -> float:
    """What the model and its calls take; a recorded graph keeps what it writes to in memory of its own."""
    if device.type != "cuda":
        return float("nan")
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return max(most, torch.cuda.memory_reserved(device)) / 1e9


def _kinds(call: Callable[[], object]) -> tuple[float, ...] | None:
    """Shares of the time on the GPU in the order of KINDS, where torch's profiler sees it."""
    sums: dict[str, float] = defaultdict(float)
    try:
        for name, time_taken in kernel_times(call):
            sums["decode" if "decode" in name else kind_of_kernel(name)] += time_taken
    except RuntimeError as failed:
        print(f"# no shares of the time: {told(failed)}", flush=True)
    total = sum(sums.values())
    return tuple(sums[kind] / total for kind in KINDS) if total else None
