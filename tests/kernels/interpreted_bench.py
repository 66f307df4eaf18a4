"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: tools/bench_gpu.py as a whole, at sizes for a CPU."""

from __future__ import annotations

import re

import pytest
import torch

from tests.kernels import interpreter
from tools.bench_gpu import main
from tools.gpu_formats import FORMATS, coded, quantize
from tools.gpu_models import SHAPES, Denoiser, inputs_of, multiply_adds

interpreter.install()
CPU = torch.device("cpu")


def test_the_whole_tool_runs_and_every_variant_gives_the_models_output(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--device", "cpu", "--small", "--rounds", "1"]
    main([*small, "--shapes", "dit-xl-block", "--only", "compiled,=ditq w4a8 FP8 and FP8 attention,=ditq w4a16"])
    main([*small, "--shapes", "flux-experts", "--only", "=ditq w4a8 FP8", "--no-products"])
    main([*small, "--shapes", "flux-4096", "--only", "window 8 in order", "--no-products"])
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.startswith("#") and "Error" in line]
    assert not failed, failed
    table = [line.rsplit(maxsplit=7) for line in re.findall(r"^(?:dit|flux).*$", out, re.MULTILINE)]
    assert len(table) == 5 + 1 + 1
    for name, *_, error in table:
        if "4096" in name:  # which is not compared with float32
            assert error == "nan"
            continue
        bound = 0.01 if "bf16" in name else 0.2
        assert float(error) < bound, (name, error)
    assert len(re.findall(r"ditq w\d\S*(?: FP8)? (?:\d+ x \d+|written in full, alone) ", out)) == 16


def test_sizes_are_those_of_the_real_models() -> None:
    """FLUX.1: 11.9e9 parameters; its blocks' linears over tokens, 19 x (12 + 12) and 38 x (3 + 4 + 5) squares of the width."""
    with torch.device("meta"):
        model = Denoiser(SHAPES["flux"])
        assert 11.5e9 < sum(parameter.numel() for parameter in model.parameters()) < 12e9
    image, text, square = 4096, 512, 3072**2
    linear = (19 * 12 * (image + text) + 38 * 12 * (image + text)) * square
    assert multiply_adds(model) == (linear, 2 * 57 * (image + text) ** 2 * 3072)
    with torch.device("meta"):
        dense, experts = (Denoiser(SHAPES[name]) for name in ("flux-feed-forward", "flux-experts"))
    assert multiply_adds(dense) == (8 * 4608 * square, 0)
    slots = 12 * 960  # 4608 tokens x top 2 x capacity 1.25 / 12
    assert multiply_adds(experts) == ((2 * 4608 + slots // 2) * square + 4608 * 12 * 3072, 0)


def test_the_benchmarks_layers_mean_their_weights() -> None:
    weight = torch.randn(40, 128)
    error = {
        name: float((coded(weight, form).decode() - weight).norm() / weight.norm()) for name, form in FORMATS.items()
    }
    assert error["w8a8"] < 0.02 and error["w4a8"] < 0.15 and error["w3a8"] < 0.3 and error["w4a16"] < 0.15


def test_quantized_models_compute_what_the_models_compute() -> None:
    shape = SHAPES["sd35-block"].small()
    inputs = inputs_of(shape, CPU, torch.float32)
    model = Denoiser(shape).generate()
    expected = model(**inputs)
    found = quantize(model, FORMATS["w8a8"], CPU)(**inputs)
    assert float((found - expected).norm() / expected.norm()) < 0.03
