"""On a real GPU, where there is one: every way that a product may run gives its meaning, and tokens are cut in any way."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

import triton  # noqa: E402

from ditq.kernels import quantize  # noqa: E402  triton first
from ditq.kernels.fast_linear import FastLinear  # noqa: E402
from ditq.kernels.matmul import Product, matmul_meaning  # noqa: E402
from ditq.kernels.online import Cut, online  # noqa: E402
from ditq.kernels.product import run_way, whole_rows  # noqa: E402
from ditq.kernels.quantize import Before  # noqa: E402
from ditq.kernels.storage import StoredWeight, store_carrier  # noqa: E402
from ditq.kernels.tuning import Way, ways  # noqa: E402
from ditq.nn import ActivationFormat, InputTransform  # noqa: E402
from ditq.numerics.carrier import E4M3  # noqa: E402
from ditq.numerics.rotation import block_hadamard_rotation  # noqa: E402
from tests.export.quantized import quantized, relative  # noqa: E402


def stored_of(bits: int, kind: torch.dtype) -> StoredWeight:
    if kind == E4M3:
        return store_carrier(torch.randn(1152, 3072).clamp(-4, 4).to(E4M3).cuda(), torch.rand(1152).cuda() + 0.5)
    settings = {"group_size": 64} if bits < 8 else {}
    layer = quantized(torch.nn.Linear(3072, 1152), "site", bits=bits, **settings).requires_grad_(False)
    return FastLinear(layer.cuda()).stored


def tried(bits: int, kind: torch.dtype) -> list[Way]:
    major, minor = torch.cuda.get_device_capability()
    return ways(10 * major + minor, bits, kind, 1000, whole_rows=True)


@pytest.mark.parametrize(("bits", "kind"), [(3, torch.int8), (4, torch.int8), (8, torch.int8), (8, E4M3)])
@pytest.mark.parametrize("activation", ["", "gelu_tanh"])
def test_every_way_of_a_product(bits: int, kind: torch.dtype, activation: str) -> None:
    """1000 tokens, no multiple of any tile. Outputs are poisoned."""
    torch.manual_seed(bits)
    stored, scale = stored_of(bits, kind), torch.rand(1000, device="cuda") / 1000
    x = torch.randint(-127, 128, (1000, 3072), device="cuda")
    product = Product(x.to(kind), scale, stored, torch.randn(1152, device="cuda"), activation=activation)
    assert whole_rows(product)
    expected = matmul_meaning(product.x, scale, stored, product.bias, None, activation)
    right = 0
    for way in tried(bits, kind):
        try:
            y = run_way(way, product, torch.full((1000, 1152), torch.nan, dtype=torch.bfloat16, device="cuda"))
        except triton.runtime.OutOfResources:
            continue
        assert relative(y.double(), expected) < 1e-2, way
        right += 1
    assert right > 1


@pytest.mark.parametrize("cut", [Cut(16, 1), Cut(16, 2), Cut(32, 2), Cut(64, 4), Cut(128, 8)], ids=str)
@pytest.mark.parametrize("before", [Before(), Before(activation="gelu_tanh"), Before(norm=True)], ids=str)
def test_tokens_are_cut_in_any_way(cut: Cut, before: Before) -> None:
    """TF32 keeps 11 bits of what is rotated, so a number is off by one where it lies next to a tie, and rarely is."""
    torch.manual_seed(0)
    x = torch.randn(100, 3072, device="cuda").bfloat16()
    transform = InputTransform(rotations=[(0, 3072, block_hadamard_rotation(3072, 64))])
    form = ActivationFormat(8, "token")
    plan = online(transform, form, None, 3072)
    assert plan is not None
    q = torch.full((100, 3072), -128, dtype=torch.int8, device="cuda")
    scales = torch.full((100,), torch.nan, device="cuda")
    quantize.launch(x, 100, before, plan.to(x.device), q, scales, None, cut)
    _, steps, scale = quantize.quantize_meaning(x.cpu(), 100, before, transform, form)
    assert steps is not None and scale is not None
    off = (q.double().cpu() - steps).abs()
    assert float(off.max()) < 1.0 and float((off > 0.5 + 0.02).double().mean()) < 1e-2
    assert torch.allclose(scales.double().cpu(), form.unit(scale).flatten(), rtol=2e-3)
