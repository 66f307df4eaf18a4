"""Weights for inputs that are rounded: against the least squares over inputs that really were."""

from __future__ import annotations

import pytest
import torch

from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.activation_noise import for_noisy_inputs, rounding_noise
from tests.numerics.test_gptq import correlated_hessian, make_weight


def test_the_noise_of_a_token_is_a_twelfth_of_its_squared_step() -> None:
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    steps = x.abs().amax(1) / 7
    expected = float(steps.double().square().mean() / 12)
    # 4000 uniform errors: their mean square has a relative deviation of sqrt(4/5 / 4000) = 1.4 %; five of them
    torch.testing.assert_close(
        rounding_noise(x, ActivationFormat(4, "token")), torch.full((64,), expected).double(), rtol=0.07, atol=0
    )
    scale = torch.tensor(0.05)  # covers 127 * 0.05 = 6.35 deviations: nothing is clipped
    assert float(rounding_noise(x, ActivationFormat(8, "tensor"), scale).mean()) == pytest.approx(
        0.05**2 / 12, rel=0.02
    )


def test_the_weights_are_the_least_squares_over_noisy_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    hessian, weight = correlated_hessian(24, dtype=torch.float64), make_weight(6, 24).double()
    noise = 0.05 * hessian.diagonal().mean() * (0.5 + torch.rand(24, generator=generator, dtype=torch.float64))
    # Rows whose sample moments are exactly these: x^T x = H, e^T e = N, x^T e = 0.
    basis = torch.linalg.qr(torch.randn(60, 48, generator=generator, dtype=torch.float64))[0]
    x, e = basis[:, :24] @ torch.linalg.cholesky(hessian).T, basis[:, 24:] * noise.sqrt()
    best = torch.linalg.lstsq(x + e, x @ weight.T).solution.T
    target, noisy = for_noisy_inputs(weight, hessian, noise, damping=0.0)
    torch.testing.assert_close(target, best, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(noisy, hessian + torch.diag(noise))
    # and what the page says: the error of any Q is that of Q against W* under H + N, plus a constant
    constants = []
    for scale in (0.0, 0.01, 0.1):
        q = weight + scale * torch.randn(6, 24, generator=generator, dtype=torch.float64)
        lost = (x @ weight.T - (x + e) @ q.T).square().sum()
        constants.append(float(lost - (((target - q) @ noisy) * (target - q)).sum()))
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-6)


def test_damping_keeps_weights_of_directions_that_calibration_hardly_saw() -> None:
    weight, hessian, noise = (
        make_weight(6, 24),
        torch.diag(torch.tensor([1.0] * 12 + [1e-6] * 12)),
        torch.ones(24) * 0.02,
    )
    bare, damped = (for_noisy_inputs(weight, hessian, noise, damping)[0] for damping in (0.0, 0.1))
    unseen = slice(12, 24)
    assert float(bare[:, unseen].norm() / weight[:, unseen].norm()) < 1e-3
    # mean diagonal 0.5: (1e-6 + 0.05) / (1e-6 + 0.05 + 0.02)
    torch.testing.assert_close(damped[:, unseen], weight[:, unseen] * (0.05 / 0.07), rtol=1e-4, atol=0)


def test_channels_without_signal_and_noise_that_is_none_change_nothing() -> None:
    weight, hessian = make_weight(3, 8), correlated_hessian(8)
    hessian[2], hessian[:, 2] = 0, 0
    target, noisy = for_noisy_inputs(weight, hessian, torch.zeros(8))
    assert torch.equal(target, weight) and torch.equal(noisy, hessian)
    with pytest.raises(ValueError, match="not finite and positive"):
        for_noisy_inputs(weight, torch.full((8, 8), torch.nan), torch.ones(8))
