"""Learning a rotation: it stays orthogonal, finds a known answer, and keeps what cannot be improved."""

from __future__ import annotations

import pytest
import torch

from ditq.numerics.learned_rotation import cayley, refine
from ditq.numerics.rotation import (
    BlockStep,
    HeadsStep,
    PermuteStep,
    Rotation,
    block_hadamard_rotation,
    hadamard_rotation,
)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_cayley_transform_is_a_turn_by_about_its_skew_part() -> None:
    start, raw = torch.linalg.qr(_normal(16, 16))[0], _normal(16, 16, seed=1)
    skew = 1e-3 * (raw - raw.T)
    turned = cayley(start, skew)
    assert float((turned @ turned.T - torch.eye(16)).abs().max()) < 1e-14
    # (I + A/2)^-1 (I - A/2) = exp(-A) + O(A^3)
    exact = torch.linalg.matrix_exp(-skew) @ start
    assert float((turned - exact).norm()) < float(skew.norm()) ** 3


@pytest.mark.parametrize("heads", [False, True])
def test_a_known_rotation_is_found_again(heads: bool) -> None:
    # Y = X R for an R a quarter of a radian away: the least loss is 0, and R is where it lies.
    x, raw = _normal(64, 24), 0.25 * _normal(3, 8, 8, seed=1) / 8**0.5
    wanted = torch.linalg.matrix_exp((raw - raw.mT) / 2**0.5)
    if not heads:
        wanted = wanted[:1].expand(3, 8, 8)
    y = x @ torch.block_diag(*wanted)
    step = HeadsStep(torch.eye(8).double().repeat(3, 1, 1)) if heads else BlockStep(torch.eye(8).double())

    def loss(rotation: Rotation) -> torch.Tensor:
        return (rotation.apply(x) - y).square().sum() / y.square().sum()

    found, before, after = refine(Rotation(24, (step,)), loss, 60)
    assert after < 1e-3 * before
    assert float((found.matrix() - torch.block_diag(*wanted)).norm()) < 0.05 * float((wanted - torch.eye(8)).norm())


def test_what_is_learned_is_orthogonal_and_keeps_its_steps_and_cost() -> None:
    x = _normal(32, 48).float()
    start = hadamard_rotation(48)
    found, before, after = refine(start, lambda rotation: rotation.apply(x).abs().amax(1).mean(), 10)
    assert after < before
    matrix = found.matrix()
    assert float((matrix @ matrix.T - torch.eye(48)).abs().max()) < 1e-12
    assert found.multiply_adds() == start.multiply_adds() and isinstance(found.steps[1], PermuteStep)
    # made of data, so its matrices are its description
    spec, tensors = found.spec()
    assert torch.equal(Rotation.from_spec(spec, tensors).matrix(), matrix)


def test_nothing_to_gain_leaves_the_rotation_as_it_is() -> None:
    start, x = block_hadamard_rotation(32, 16), _normal(8, 32)
    found, before, after = refine(start, lambda rotation: rotation.apply(x).square().sum(), 3)
    assert after == pytest.approx(before, rel=1e-12)
    assert float((found.matrix() - start.matrix()).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="block step"):
        refine(Rotation(4, ()), lambda rotation: torch.zeros(()), 3)
