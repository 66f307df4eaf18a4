"""What is gathered of one input: a uniform sample, crest factors, and statistics as a transform changes them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ditq.calibration import second_moments
from ditq.calibration.accumulate import RowSample, crest_factors
from ditq.numerics.rotation import block_hadamard_rotation, hadamard_rotation
from tests.calibration.random_input import random_input

EPS = 2.0**-24  # unit roundoff of float32


def test_the_sample_is_uniform_and_does_not_depend_on_how_rows_come() -> None:
    count, size, draws = 30, 6, 600
    rows = torch.arange(count, dtype=torch.float32)[:, None]
    taken = torch.zeros(count)
    for seed in range(draws):
        together, apart = RowSample(1, size, seed), RowSample(1, size, seed)
        together.add(rows)
        for part in rows.split(7):
            apart.add(part)
        assert torch.equal(together.rows, apart.rows)
        assert together.rows.shape == (size, 1)
        assert (together.rows.diff(dim=0) > 0).all()
        taken[together.rows.flatten().long()] += 1
    # each row is taken Binomial(draws, size / count) times; 5 standard deviations, 30 rows
    expected, spread = draws * size / count, math.sqrt(draws * (size / count) * (1 - size / count))
    assert (taken - expected).abs().max() < 5 * spread


def test_crest_factors_reach_from_flat_to_spike() -> None:
    rows = torch.tensor([[2.0, -2, 2, -2], [0, 0, 3, 0], [0, 0, 0, 0], [1e-30, 0, 0, 0], [1e30, 0, 0, 0]])
    torch.testing.assert_close(crest_factors(rows), torch.tensor([1.0, 2, 1, 2, 2]))


def test_transformed_statistics_are_those_of_the_transformed_rows() -> None:
    found, parts = random_input()
    scale, shift = torch.linspace(0.5, 2, 24), torch.linspace(-1, 1, 24)
    rotations = [(0, 8, hadamard_rotation(8)), (12, 24, block_hadamard_rotation(12, 4))]
    changed = found.transformed(scale, shift, rotations)
    for number, part in enumerate(parts):
        x = part.double() * scale.double() - shift.double()
        for start, stop, rotation in rotations:
            x[:, start:stop] = x[:, start:stop] @ rotation.matrix()
        # float32 sums of 40 rows went in, float32 comes out; no value is much above 10
        bound = 40 * EPS * 40 * 10**2
        torch.testing.assert_close(changed.second_moment[number].double(), x.T @ x, rtol=0, atol=bound)
        torch.testing.assert_close(changed.total[number].double(), x.sum(0), rtol=0, atol=40 * EPS * 40 * 10)
        # every row was sampled, so these are exact up to rounding
        torch.testing.assert_close(changed.absmax[number].double(), x.abs().amax(0), rtol=8 * EPS, atol=8 * EPS)
        crest = (x.abs().amax(1) / x.square().mean(1).sqrt()).mean()
        assert float(changed.crest[number]) == pytest.approx(float(crest), rel=24 * EPS)
        torch.testing.assert_close(changed.sample[changed.sample_bin == number].double(), x, rtol=EPS, atol=EPS)


def test_a_changed_inputs_second_moments_are_symmetric_and_made_only_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(second_moments, "AT_ONCE", 24 * 5)  # bands of five rows, the last of four
    found, _ = random_input()
    changed = found.transformed(torch.linspace(0.5, 2, 24), torch.linspace(-1, 1, 24), [(0, 24, hadamard_rotation(24))])
    before = changed.rms()
    assert "second_moment" not in vars(changed)
    assert torch.equal(changed.second_moment, changed.second_moment.mT)
    assert before == pytest.approx(float(changed.channel_rms.double().square().mean().sqrt()), rel=1e-6)


def test_scaling_alone_keeps_the_exact_absmax() -> None:
    found, _ = random_input()
    few = replace(found, sample=found.sample[:1], sample_bin=found.sample_bin[:1])
    scale = torch.linspace(0.5, 2, 24)
    assert torch.equal(few.transformed(scale).absmax, found.absmax * scale)
    assert torch.equal(found.transformed().hessian(), found.hessian())
