"""A linear that is learned starts as the quantized layer that it stands for, and gradients reach what it may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.nn import ActivationFormat, QuantLinear
from ditq.nn.learned_linear import LearnedLinear
from ditq.numerics.carrier import FLOAT8
from ditq.numerics.codebook import CODEBOOKS, encode
from ditq.numerics.low_rank import code_with_branch

FORMS = {
    "one table": {"codebook": "twin_log_shared"},
    "a table a row": {"codebook": "twin_log"},
    "groups by multipliers": {"codebook": "twin_log_shared", "group_size": 16},
    "groups by multipliers, fp8": {"codebook": "twin_log_shared", "group_size": 16, "carrier": FLOAT8},
    "groups by multipliers, 5 bits": {"codebook": "uniform", "group_size": 16, "bits": 5},
    "groups in float": {"codebook": "uniform", "group_size": 16, "float_group_scales": True},
}


def _layer(
    name: str, activation: ActivationFormat, rank: int = 0, branch: str = "integer"
) -> tuple[QuantLinear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator) * 0.1
    settings = dict(FORMS[name])
    fitter, bits = CODEBOOKS[str(settings.pop("codebook"))], int(settings.pop("bits", 3))  # type: ignore[call-overload]

    def coded(part: Tensor):
        return encode(part, fitter(part, bits, **settings))

    code = code_with_branch(weight, None, rank, coded, lambda w: float((w - weight).norm())) if rank else coded(weight)
    bias = torch.randn(24, generator=generator)
    return QuantLinear("site", code, bias, activation, branch=branch), weight  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMS)
def test_it_starts_as_the_layer_that_it_stands_for(name: str) -> None:
    activation = ActivationFormat() if name == "groups in float" else ActivationFormat(6, "token")
    layer, weight = _layer(name, activation)
    learned = LearnedLinear(layer, weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(learned(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(learned.code().codes, layer.code().codes)
    assert torch.equal(learned.code().decode(), layer.code().decode())


@pytest.mark.parametrize("activation", [ActivationFormat(4, "token"), ActivationFormat(4, "group", group_size=16)])
@pytest.mark.parametrize("branch", ["integer", "float"])
def test_a_low_rank_branch_stays_as_it_is(branch: str, activation: ActivationFormat) -> None:
    layer, weight = _layer("one table", activation, rank=4, branch=branch)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(LearnedLinear(layer, weight)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_gradients_pass_the_roundings_straight_through() -> None:
    """dL/dw = g x^T for L = <g, y>; u gets it times the scale, a scale's factor <dL/dw, w>, a level the sum over its codes."""
    layer, weight = _layer("one table", ActivationFormat())
    learned = LearnedLinear(layer, weight)
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(5, 64, generator=generator), torch.randn(5, 24, generator=generator)
    (learned(x) * g).sum().backward()
    of_weight, code = g.T @ x, layer.code()
    scaled = of_weight * code.scale[:, None]
    torch.testing.assert_close(learned.latent.grad, scaled)
    torch.testing.assert_close(learned.factor.grad, (of_weight * code.decode()).sum(1), rtol=1e-4, atol=1e-4)
    levels = torch.zeros(8).index_add_(0, code.codes.flatten().long(), scaled.flatten())
    torch.testing.assert_close(learned.table.grad, levels, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learned.bias.grad, g.sum(0))


def test_gradients_of_the_input_pass_its_rounding_too() -> None:
    layer, weight = _layer("one table", ActivationFormat(4, "token"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    LearnedLinear(layer, weight)(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight().sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)


def test_what_was_learned_is_a_code_of_the_same_form() -> None:
    layer, weight = _layer("a table a row", ActivationFormat(8, "token"))
    learned = LearnedLinear(layer, weight)
    with torch.no_grad():
        learned.latent += torch.randn_like(learned.latent) * 5
        learned.table += torch.randn_like(learned.table) * 3
        learned.factor *= 1.1
    code = learned.code()
    assert (code.table.diff(dim=1) >= 0).all() and code.table.abs().max() <= 64
    layer.recode(code, learned.bias.detach())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(learned(x), layer(x), rtol=1e-5, atol=1e-5)
