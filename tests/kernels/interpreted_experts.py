"""Run by test_in_interpreter.py with TRITON_INTERPRET=1: products of all experts in one kernel, and whole mixtures of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from ditq.kernels.decode import decode_into
from ditq.kernels.fast_experts import FastMixture
from ditq.kernels.matmul import Product, Tile, experts_meaning, launch
from ditq.kernels.on_gpu import separate_experts, to_gpu
from ditq.kernels.product import computed
from ditq.kernels.storage import StoredWeight, carrier_meaning, stack, store_carrier
from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.nn.sliced import FeedForwardForm
from ditq.nn.structural.experts import MixtureOfExperts, divided
from ditq.numerics.carrier import E4M3
from ditq.numerics.rotation import block_hadamard_rotation
from tests.export.quantized import quantized, relative
from tests.kernels import interpreter
from tests.kernels.interpreted_matmul import weight

interpreter.install()
SMALL, TURNED = Tile(32, 64), Tile(16, 32, weight_first=True)
EXPERTS, SLOTS, SAMPLES, TOKENS = 3, 21, 2, 30


def experts(rows: int, columns: int, bits: int, form: str = "table", float8: bool = False) -> StoredWeight:
    """Weights that differ in table, codes and scales, one after the other."""
    made = [weight(rows, columns, bits, form, float8, seed=number) for number in range(EXPERTS)]
    return stack(made)


def operands(stored: StoredWeight, kind: str) -> Product:
    """Rows of TOKENS tokens a sample. Of one expert no slot is used, of another the last ones are not."""
    generator = torch.Generator().manual_seed(stored.rows)
    x = torch.randint(-127, 128, (SAMPLES * TOKENS, stored.columns), generator=generator).to(torch.int8)
    scale: torch.Tensor | None = torch.rand(len(x), generator=generator) + 0.1
    if kind == "float8":
        x = x.float().to(E4M3)
    elif kind == "float":
        x, scale = torch.randn(x.shape, generator=generator).bfloat16(), None
    chosen = torch.randint(0, len(x), (SAMPLES * EXPERTS, SLOTS), generator=generator, dtype=torch.int32)
    chosen[1], chosen[3, 17:] = -1, -1
    bias = torch.randn(stored.rows, generator=generator)
    return Product(x, scale, stored, bias, chosen=chosen, experts=EXPERTS)


def check(product: Product, tile: Tile) -> None:
    """The kernel fills every output, poisoned with NaN before, with the meaning, and unused slots with 0."""
    assert product.chosen is not None
    count, slots, outputs = product.size
    y = torch.full((count * slots, outputs), torch.nan)
    launch(product, y, tile)
    expected = experts_meaning(product)
    # Errors as in interpreted_matmul.py: those of float32 sums, or of weights in bfloat16 by group.
    unit = 2.0**-24 * (8 if product.x.dtype == torch.int8 else product.stored.columns)
    unit += 2.0**-8 if product.x_scale is None and product.stored.scale.dim() == 2 else 0
    size = product.stored.columns**0.5 * expected.std() + expected.abs() + 4
    error = (y.double() - expected).abs()
    assert bool((error <= unit * size).all()), float((error / size).max() / unit)
    assert not y.view(count, slots, -1)[product.chosen < 0].any()


@pytest.mark.parametrize(
    ("bits", "form"), [(2, "table"), (3, "multipliers"), (3, "rows"), (4, "multipliers"), (4, "rows")]
)
def test_experts_of_every_form(bits: int, form: str) -> None:
    check(operands(experts(72, 192, bits, form), "int8"), SMALL)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_weight_may_stand_first_and_widths_need_not_fit_a_tile(bits: int) -> None:
    check(operands(experts(40, 100, bits), "int8"), TURNED)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_float8_experts(bits: int) -> None:
    check(operands(experts(40, 128, bits, float8=True), "float8"), SMALL)


@pytest.mark.parametrize(("bits", "form"), [(2, "table"), (4, "scales"), (8, "scales")])
def test_experts_of_inputs_in_floating_point(bits: int, form: str) -> None:
    check(operands(experts(40, 128, bits, form), "float"), SMALL)


def test_every_slot_gets_the_row_and_the_expert_that_are_meant() -> None:
    """Token n of all ones times n, expert e a weight of e + 1: each answer tells who gave it to whom."""
    carriers = (
        torch.ones(EXPERTS * 8, 64, dtype=torch.int8) * torch.arange(1, EXPERTS + 1).repeat_interleave(8)[:, None]
    )
    x = torch.arange(12, dtype=torch.int8)[:, None].expand(12, 64).contiguous()
    chosen = torch.tensor([[3, 0], [11, -1], [5, 5], [7, 2], [-1, -1], [1, 9]], dtype=torch.int32)
    product = Product(
        x, torch.ones(12), store_carrier(carriers.to(torch.int8), torch.ones(24)), chosen=chosen, experts=3
    )
    found = computed(product, torch.float32).view(6, 2, 8)
    expected = 64 * chosen.clamp_min(0).float() * torch.tensor([1.0, 2, 3, 1, 2, 3])[:, None]
    assert torch.equal(found, expected[..., None].expand(6, 2, 8))


@pytest.mark.parametrize("bits", [2, 4])
def test_experts_written_out_in_full_have_each_its_own_table(bits: int) -> None:
    stored = experts(72, 192, bits)
    carriers = torch.zeros(stored.rows, stored.columns, dtype=torch.int8)
    decode_into(stored, carriers)
    assert torch.equal(carriers, carrier_meaning(stored))
    alone = [carrier_meaning(weight(72, 192, bits, seed=number)) for number in range(EXPERTS)]
    assert torch.equal(carriers, torch.cat(alone))


# --- whole mixtures

WIDTH, HIDDEN, ROUTED = 64, 160, 32  # a shared expert of 64 and three of 32 hidden channels
FORM = FeedForwardForm(("net.0.proj",), "net.2", HIDDEN)


def mixture(choice: str = "token", function: str = "gelu-approximate", **settings: Any) -> MixtureOfExperts:
    torch.manual_seed(0)
    dense = FeedForward(WIDTH, inner_dim=HIDDEN, activation_fn=function).eval().requires_grad_(False)
    order = torch.randperm(HIDDEN)
    parts = order[HIDDEN - EXPERTS * ROUTED :].view(EXPERTS, ROUTED)
    made = divided(dense, FORM, order[: HIDDEN - EXPERTS * ROUTED], parts, top=2, capacity=1.25, choice=choice)
    nn.init.normal_(made.router.weight)  # type: ignore[arg-type]
    for name, linear in list(made.named_modules()):
        if isinstance(linear, nn.Linear) and name != "router":
            made.set_submodule(name, layer(linear, name, **settings))
    return made.eval()


def layer(linear: nn.Linear, name: str, seed: int = 1, **settings: Any) -> QuantLinear:
    width = linear.in_features
    rotation = InputTransform(rotations=[(0, width, block_hadamard_rotation(width, 32, seed=seed))])
    linear.bias = nn.Parameter(torch.randn(linear.out_features))
    return quantized(linear, name, **{"transform": rotation, **settings}).requires_grad_(False)


def agreement(made: MixtureOfExperts, dtype: torch.dtype = torch.bfloat16) -> tuple[FastMixture, float]:
    """(what stands in its place on a GPU, how far its answer is from the meaning)."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        expected = made(x.float())
        fast = to_gpu(nn.Sequential(made), torch.device("cpu"))[0]
        assert isinstance(fast, FastMixture)
        return fast, relative(fast(x).float(), expected)


FORMATS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32}, {"bits": 3}, {"bits": 4, "activation": ActivationFormat(4, "token", "midrise")},
    {"bits": 4, "activation": ActivationFormat(), "transform": None},
]  # fmt: skip


@pytest.mark.parametrize(("number", "choice"), [(0, "token"), (0, "expert"), (1, "token"), (2, "expert"), (3, "token")])
def test_a_mixture_in_joined_kernels_computes_its_meaning(number: int, choice: str) -> None:
    """As interpreted_fast_linear.py for single linears, of which a token passes two behind each other."""
    fast, error = agreement(mixture(choice, **FORMATS[number]))
    assert fast.why_separate is None and fast.joint is not None
    assert error < 1.5e-2


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_other_activations_and_gated_ones_stand_between_the_joined_linears(activation: str) -> None:
    _, error = agreement(mixture(function=activation))
    assert error < 1.5e-2


def test_experts_that_do_not_share_a_form_keep_kernels_of_their_own_and_it_is_said() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("transformed or rounded differently", {"seed": 2}), ("low-rank branches", {"rank": 2}),
        ("groups of columns differ", {"group_size": 32}), ("formats differ", {"bits": 3}),
    ]  # fmt: skip
    for says, settings in cases:
        made = mixture()
        other = nn.Linear(ROUTED, WIDTH).requires_grad_(False)
        made.experts[1].set_submodule("net.2", layer(other, "other", **settings))
        reason = to_gpu(nn.Sequential(copy.deepcopy(made)), torch.device("cpu"))[0].why_separate  # type: ignore[index]
        assert says in reason
    assert agreement(made)[1] < 1.5e-2
    made = mixture()
    made.experts[2].set_submodule("net.2", nn.Linear(ROUTED, WIDTH).requires_grad_(False))
    model = nn.Sequential(made, mixture())
    to_gpu(model, torch.device("cpu"))
    assert "0 (1 in all): not all of their linears are quantized" in (separate_experts(model) or "")
    assert separate_experts(nn.Sequential(model[1])) is None


def test_the_router_decides_in_float32() -> None:
    """A balance of thousands would leave bfloat16 nothing to decide by."""
    made = mixture()
    made.balance.data.fill_(5000.0)
    x = torch.randn(2, 11, WIDTH).bfloat16()
    expected = made.scores(x.float())
    fast = to_gpu(nn.Sequential(made), torch.device("cpu"))[0]  # type: ignore[index]
    assert torch.equal(fast.router(x), expected)
