"""ST-LPIPS as an optional extra: absent, damaged. With its real weights: test_perceptual_weights.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from ditq.errors import DitqError
from ditq.report import perceptual


def test_without_the_package_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    picture = np.zeros((64, 64, 3), np.uint8)
    assert perceptual.weights_path() is None
    assert perceptual.st_lpips(picture, picture) is None
    assert "pip install" in perceptual.NOT_INSTALLED and "stlpips-pytorch==0.0.2" in perceptual.NOT_INSTALLED


@pytest.fixture
def foreign_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name whose __init__ must not run; its weights file is the test's to write."""
    package = tmp_path / perceptual.PACKAGE
    (package / perceptual.WEIGHTS).parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, perceptual.PACKAGE, raising=False)
    return package / perceptual.WEIGHTS


def test_the_package_is_found_without_running_it(foreign_package: Path) -> None:
    assert perceptual.weights_path() is None  # installed, but without its weights
    foreign_package.write_bytes(b"")
    assert perceptual.weights_path() == foreign_package
    assert perceptual.PACKAGE not in sys.modules


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"cposix\nsystem\n(S'echo ran'\ntR."])
def test_damaged_or_hostile_weights_are_refused(foreign_package: Path, content: bytes) -> None:
    foreign_package.write_bytes(content)
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(DitqError, match="weights cannot be read; install them again"):
        perceptual.st_lpips(picture, picture)


def test_pictures_too_small_for_the_network_have_no_number() -> None:
    picture = np.random.default_rng(0).random((20, 40, 3))
    assert perceptual.st_lpips(picture, 1 - picture) is None
