"""Second moments of a changed input, where its channels hardly move about large means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditq.calibration import second_moments
from ditq.calibration.accumulate import InputAccumulator
from ditq.calibration.input_statistics import InputStatistics
from ditq.numerics.rotation import hadamard_rotation

ROWS, WIDTH = 1 << 14, 16


def _input(spread: float, by_bin: bool) -> tuple[InputStatistics, Tensor]:
    """Two bins of correlated channels; three of them stand at large means, `spread` about them."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    x = x + 0.7 * x.roll(1, 1)
    x[:, 5:8] = torch.tensor([7.893052, 4.867592, -3.754751]) + spread * x[:, 5:8]
    found = InputAccumulator("x", WIDTH, 2, 256, 0, by_bin)
    for number, part in enumerate(x.split(1024)):
        assert found.add(part, number % 2)
    return InputStatistics(**found.tensors()), x.double()


@pytest.mark.parametrize("by_bin", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4])
def test_rounding_of_the_sums_is_not_scaled_up(spread: float, by_bin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "AT_ONCE", WIDTH * 5)  # bands of five rows, the last of one
    found, x = _input(spread, by_bin)
    scale, rotation = torch.ones(WIDTH), hadamard_rotation(WIDTH)
    scale[5:8] = 1e4 if spread < 1e-4 else 1e2
    mean = found.mean().double() * scale
    changed = found.transformed(scale, mean, [(0, WIDTH, rotation)])
    exact = x * scale - mean
    small = exact.mean(0).square() + (x - x.mean(0)).square().mean(0) * scale**2
    exact = rotation.apply(exact)
    expected = exact.T @ exact / ROWS
    hessian = changed.hessian().double()
    # The sample is of 512 rows, and leaves out how the three go together: a spread of up to 1 beside those of up to 2.
    assert float((hessian - expected).norm() / expected.norm()) < 0.01 + 0.5 * float(small[5:8].sum() / small.sum())
    assert float(torch.linalg.eigvalsh(hessian)[0]) > -1e-6
    assert changed.rms() == pytest.approx(float(small.mean().sqrt()), rel=0.05)


def test_what_the_sums_tell_is_taken_from_them() -> None:
    found, x = _input(0.1, by_bin=True)
    mean = found.mean().double()
    exact = x - mean
    torch.testing.assert_close(
        found.transformed(None, mean).hessian().double(), exact.T @ exact / ROWS, rtol=0, atol=1e-4
    )
