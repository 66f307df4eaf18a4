"""Times, memory and errors of quantized denoisers on one GPU, beside what torch itself offers: bfloat16, FP8 and int8.

    python -m tools.bench_gpu                                  # blocks and products, minutes
    python -m tools.bench_gpu --shapes flux --only "bf16 compiled,w4a8"

It needs torch and Triton, nothing else of ditq's dependencies. Weights are generated, and rounded to the nearest level: errors
tell formats apart but say nothing of a recipe's quality.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.kernels.captured import CapturedCalls
from ditq.kernels.on_gpu import to_gpu
from ditq.kernels.traced import Compiler, compiled, inductor
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.numerics.carrier import E4M3, FLOAT8, INT8, Carrier
from ditq.numerics.rotation import block_hadamard_rotation
from ditq.numerics.weight_code import WeightCode
from tools.gpu_models import SHAPES, Denoiser, Shape, inputs_of, multiply_adds

Call = Callable[[Mapping[str, Tensor]], Tensor]
GROUP, BLOCK = 64, 64


@dataclass(frozen=True)
class Format:
    """bits of the weight, format of the input, whether columns have scales in groups and inputs are rotated."""

    bits: int
    activation: ActivationFormat
    grouped: bool = True
    rotated: bool = True
    carrier: Carrier = INT8


TOKEN = ActivationFormat(8, "token")
FORMATS = {
    "w8a8": Format(8, TOKEN, grouped=False),
    "w4a8": Format(4, TOKEN),
    "w4a8 without rotation": Format(4, TOKEN, rotated=False),
    "w3a8": Format(3, TOKEN),
    "w8a8 FP8": Format(8, ActivationFormat(8, "token", "float8_e4m3"), grouped=False, carrier=FLOAT8),
    "w4a8 FP8": Format(4, ActivationFormat(8, "token", "float8_e4m3"), grouped=False, carrier=FLOAT8),
    "w4a16": Format(4, ActivationFormat(), rotated=False),
}


# --- what torch itself offers


class Float8Linear(nn.Module):
    """FP8 inputs and weights with a scale a token and a row: torch._scaled_mm."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.float().abs().amax(1, keepdim=True) / 448
        self.weight = (linear.weight.float() / scale).to(E4M3)
        self.scale, self.bias = scale.T.contiguous(), None if linear.bias is None else linear.bias.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scale = (tokens.abs().amax(1, keepdim=True).float() / 448).clamp_min(1e-8)
        q = (tokens.float() / scale).clamp(-448, 448).to(E4M3)
        y = torch._scaled_mm(
            q, self.weight.T, scale, self.scale, self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return y.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """int8 inputs and weights with a scale a token and a row: torch._int_mm."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.float().abs().amax(1) / 127
        self.weight = (linear.weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale, self.bias = scale, None if linear.bias is None else linear.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scale = (tokens.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-8)
        q = (tokens.float() / scale).round().to(torch.int8)
        y = torch._int_mm(q, self.weight.T).float() * scale * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


# --- ditq's layers of generated weights


def twin_log_table(bits: int, carrier: Carrier, mu: float = 8.0) -> Tensor:
    """Levels C_k = ((1 + mu)^((k + 1/2) / (n - 1/2)) - 1) / mu of both signs, on the carrier's grid (how-it-works.md)."""
    n = 2 ** (bits - 1)
    levels = ((1 + mu) ** ((torch.arange(n) + 0.5) / (n - 0.5)) - 1) / mu
    positive = carrier.distinct(carrier.largest(bits) * levels, carrier.largest(bits))
    return carrier.stored(torch.cat((-positive.flip(0), positive)))


def coded(weight: Tensor, form: Format) -> WeightCode:
    """weight [O, I] float32 -> the nearest levels, with a scale a row, and where grouped the groups' own range within it."""
    carrier, bits = form.carrier, form.bits
    table = carrier.grid() if bits == 8 else twin_log_table(bits, carrier)
    table = table.to(weight.device)
    top = float(table.float().abs().max()) - (1 if bits == 8 and carrier is INT8 else 0)
    grouped = form.grouped and weight.shape[1] % GROUP == 0
    parts = weight.unflatten(1, (-1, GROUP if grouped else weight.shape[1]))
    largest = parts.abs().amax(2)
    scale, multiplier = largest.amax(1) / top, None
    steps = largest / top
    if grouped and form.activation.granularity == "none":
        scale = steps
    elif grouped:
        multiplier = (steps / scale[:, None] * 255).ceil().clamp(1, 255).to(torch.uint8)
        steps = multiplier.float() / 255 * scale[:, None]
    levels = table.float()
    codes = torch.bucketize((parts / steps[:, :, None]).flatten(1), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return WeightCode(codes, table, scale, multiplier, bits)


def quantize(model: nn.Module, form: Format, device: torch.device) -> nn.Module:
    """A QuantLinear in the place of every linear but routers, one by one; of the modulation with inputs in floating point."""
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name.endswith("router"):
            continue
        weight = linear.weight.detach().to(device, torch.float32)
        transform, activation = None, form.activation
        if "modulation" in name:
            activation = ActivationFormat()
        elif form.rotated:
            rotation = block_hadamard_rotation(linear.in_features, math.gcd(linear.in_features, BLOCK))
            step = rotation.steps[0].apply(weight)  # type: ignore[union-attr]
            weight, transform = step, InputTransform(rotations=[(0, linear.in_features, rotation)])
        chosen = Format(4 if form.bits < 8 else 8, activation) if "modulation" in name else form
        code = coded(weight, chosen)
        bias = None if linear.bias is None else linear.bias.to(device)
        model.set_submodule(name, QuantLinear(name, code, bias, activation, transform=transform).to(device))
    return model


def with_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Another layer in the place of each linear over tokens; the modulation, whose single rows do not pay, and routers stay."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "modulation" not in name and not name.endswith("router"):
            model.set_submodule(name, make(linear))
    return model


# --- the rows


@dataclass(frozen=True)
class Row:
    """What one variant took; error: ||difference|| / ||output|| from float32 with the weights as they were."""

    shape: str
    variant: str
    milliseconds: float
    teraflops: float
    share: float
    gigabytes: float
    error: float

    HEAD = f"{'shape':14s} {'variant':24s} {'ms':>9s} {'TFLOP/s':>9s} {'of peak':>8s} {'GB':>7s} {'error':>9s}"

    def __str__(self) -> str:
        return (
            f"{self.shape:14s} {self.variant:24s} {self.milliseconds:9.3f} {self.teraflops:9.1f} {self.share:8.1%} "
            f"{self.gigabytes:7.2f} {self.error:9.2e}"
        )


def variants(device: torch.device, inner: Compiler) -> dict[str, tuple[str, Callable[[Denoiser], Call]]]:
    """By name: (the numbers it multiplies, a function that makes of a bfloat16 model on the device what is called)."""

    def by_name(forward: Callable[..., Any]) -> Call:
        return lambda given: forward(**given)

    def torch_compiled(model: nn.Module) -> Call:
        options: dict[str, Any] = {"mode": "max-autotune"} if device.type == "cuda" else {"backend": "eager"}
        return by_name(torch.compile(model, dynamic=False, fullgraph=True, **options))

    def ours(form: Format) -> Callable[[Denoiser], Call]:
        def make(model: Denoiser) -> Call:
            capability = None
            if device.type == "cuda":
                major, minor = torch.cuda.get_device_capability(device)
                capability = 10 * major + minor
            call = by_name(compiled(to_gpu(quantize(model, form, device), device, capability), inner))
            return CapturedCalls(call) if device.type == "cuda" else call

        return make

    found: dict[str, tuple[str, Callable[[Denoiser], Call]]] = {
        "bf16 eager": ("bf16", by_name),
        "bf16 compiled": ("bf16", torch_compiled),
        "FP8 rowwise compiled": ("fp8", lambda model: torch_compiled(with_linears(model, Float8Linear))),
        "int8 dynamic compiled": ("int8", lambda model: torch_compiled(with_linears(model, Int8Linear))),
    }
    for name, form in FORMATS.items():
        number = "bf16" if form.activation.granularity == "none" else "fp8" if form.carrier is FLOAT8 else "int8"
        found[f"ditq {name}"] = (number, ours(form))
    return found


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
) -> Iterator[Row]:
    """A row a variant, each made anew from the same generated weights."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = reference(shape, device)
    inputs = inputs_of(shape, device, torch.bfloat16)
    for name, (number, make) in variants(device, inner).items():
        if only and not any(part in name for part in only):
            continue
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with torch.no_grad():
                model = generated(shape, device, torch.bfloat16)
                amount = sum(multiply_adds(model))
                call = make(model)
                del model
                found = call(inputs).float().cpu()
                if device.type == "cuda":  # what calls need, not what making the model took
                    torch.cuda.reset_peak_memory_stats(device)
                taken = seconds(partial(call, inputs), device, rounds)
        except Exception as failed:  # one variant that a machine has not must not cost the others' rows
            print(f"# {shape.name} {name}: {_told(failed)}", flush=True)
            continue
        memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
        error = float((found - expected).norm() / expected.norm())
        share = amount / taken / peak[number] if number in peak else float("nan")
        yield Row(shape.name, name, 1e3 * taken, 2e-12 * amount / taken, share, memory, error)
        del call


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def product_rows(device: torch.device, shapes: list[tuple[int, int, int]], rounds: int) -> Iterator[str]:
    """One line a way of each product [M, K] x [K, N]: what torch has, and every tile of ditq's kernels, alone."""
    from ditq.kernels import matmul
    from ditq.kernels.decode import decode_into
    from ditq.kernels.storage import store, store_carrier
    from ditq.kernels.tuning import tiles

    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    capability = 10 * major + minor
    for tokens, outputs, columns in shapes:
        x = torch.randn(tokens, columns, device=device)
        weight = torch.randn(outputs, columns, device=device) * columns**-0.5
        q, scale = (x * 30).round().clamp(-127, 127).to(torch.int8), torch.rand(tokens, device=device) / 30
        dense, half = weight.to(torch.bfloat16), x.to(torch.bfloat16)
        integer = (weight * 127 / weight.abs().max()).round().to(torch.int8)
        y = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=device)
        full = torch.empty(outputs, columns, dtype=torch.int8, device=device)
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("torch bf16", partial(F.linear, half, dense)),
            ("torch int8 without scales", partial(torch._int_mm, q, integer.T)),
        ]
        for name in ("w8a8", "w4a8", "w3a8"):
            code = coded(weight, FORMATS[name])
            stored = store_carrier(code.carrier(), code.scale) if code.bits == 8 else store(code)
            for tile in tiles(capability, stored.bits, torch.int8):
                run = partial(matmul.launch, matmul.Product(q, scale, stored), y, tile)
                calls.append((f"ditq {name} {tile.tokens}x{tile.outputs}", run))
            if code.bits < 8:
                calls.append((f"ditq {name} written in full", partial(decode_into, stored, full)))
        for name, call in calls:
            try:
                taken = seconds(call, device, max(1, rounds // 4), at_once=10)
            except Exception as failed:
                print(f"# {name}: {_told(failed)}", flush=True)
                continue
            yield (f"{tokens} x {outputs} x {columns:6d}  {name:28s} {1e3 * taken:9.4f} ms "
                   f"{2e-12 * tokens * outputs * columns / taken:9.1f} TFLOP/s")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Print what runs where, the measured peaks, the products' lines and the models' table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--only", default="", help="parts of variants' names, by commas")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-products", action="store_true", help="leave the single products out")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the tool itself")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no NVIDIA GPU; --device cpu --small tries the tool itself")
    unknown = [name for name in given.shapes.split(",") if name not in SHAPES]
    if unknown:
        sys.exit(f"error: --shapes {','.join(unknown)}: choose from {', '.join(SHAPES)}")
    import triton

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"# {where}, torch {torch.__version__}, triton {triton.__version__}")
    peak = peaks(device, 128 if given.small else 8192)
    for name, value in peak.items():
        print(f"# {name} product of torch: {2e-12 * value:.1f} TFLOP/s")
    if not given.no_products:
        widths = (
            [(8, 64, 64)]
            if given.small
            else [(4608, 12288, 3072), (4608, 3072, 12288), (4608, 3072, 3072), (2048, 4608, 1152)]
        )
        for line in product_rows(device, widths, given.rounds):
            print(line, flush=True)
    print(Row.HEAD)
    inner: Compiler = inductor if device.type == "cuda" else (lambda graph, _: copy.deepcopy(graph).forward)
    for name in given.shapes.split(","):
        shape = SHAPES[name].small() if given.small else SHAPES[name]
        for row in rows(
            shape, device, [part.strip() for part in given.only.split(",") if part.strip()], peak, given.rounds, inner
        ):
            print(row, flush=True)


if __name__ == "__main__":
    main()
