"""ST-LPIPS, the shift-tolerant learned perceptual distance, with the weights of an optional package.

Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV 2022, on the LPIPS of Zhang et al., CVPR 2018:
both pictures go through an AlexNet without strides whose feature maps are blurred before they are thinned out; each
feature vector is brought to unit length, the squared differences are weighed by channel and averaged over the picture,
and the five layers are added up. The package `stlpips-pytorch` is only read as a file, never imported.
"""

from __future__ import annotations

import importlib.util
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.errors import DitqError
from ditq.report.metrics import Picture, as_unit

PACKAGE = "stlpips_pytorch"
WEIGHTS = Path("weights/vST0.0/alex_shift_tolerant.pth")
INSTALL = "pip install --no-deps stlpips-pytorch==0.0.2"
NOT_INSTALLED = f"not installed: {INSTALL}"


def file_of_package(package: str, file: Path) -> Path | None:
    """A file inside an installed package, found without importing that; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    return None


def weights_path() -> Path | None:
    """The weights of ST-LPIPS; None where the optional package is not installed."""
    return file_of_package(PACKAGE, WEIGHTS)


class ShiftTolerantLPIPS(nn.Module):
    """The AlexNet variant: five convolutions, blur where AlexNet has strides, and a weight for each channel."""

    # (name in the weights file, padding of the convolution, blur before it, channel weights of its features)
    LAYERS = (
        ("net.slice1.0", 2, None, "lin0"),
        ("net.slice2.5", 2, "net.slice2.4", "lin1"),
        ("net.slice3.9", 1, "net.slice3.8", "lin2"),
        ("net.slice4.11", 1, None, "lin3"),
        ("net.slice5.13", 1, None, "lin4"),
    )

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = {name: tensor.float() for name, tensor in state.items()}

    @staticmethod
    def _blur_and_halve(x: Tensor, window: Tensor) -> Tensor:
        # Two rows of reflection on each side, one more than the window needs: the paper's wider padding.
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), window, stride=2, groups=x.shape[1])

    def features(self, x: Tensor) -> list[Tensor]:
        """Five feature maps of x [B, 3, H, W] in [-1, 1], each of unit length over its channels."""
        maps: list[Tensor] = []
        x = (x - self.weights["scaling_layer.shift"]) / self.weights["scaling_layer.scale"]
        for name, padding, blur, _ in self.LAYERS:
            if blur is not None:
                x = self._blur_and_halve(F.max_pool2d(x, kernel_size=3, stride=1), self.weights[f"{blur}.filt"])
            x = F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=padding)
            if not maps:
                x = self._blur_and_halve(x, self.weights["net.slice1.1.filt"])
            x = F.relu(x)
            maps.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return maps

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b [B, 3, H, W] in [-1, 1] -> distance [B], 0 for identical pictures."""
        total = torch.zeros(a.shape[0])
        for (*_, channel_weights), x, y in zip(self.LAYERS, self.features(a), self.features(b), strict=True):
            weighed = F.conv2d((x - y).square(), self.weights[f"{channel_weights}.model.1.weight"])
            total = total + weighed.mean(dim=(1, 2, 3))
        return total


SMALLEST = 21  # pixels along a side: of less nothing is left to be padded


@lru_cache(maxsize=1)
def _network(path: Path) -> ShiftTolerantLPIPS:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return ShiftTolerantLPIPS(state)
    except (OSError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise DitqError(f"{path}: the ST-LPIPS weights cannot be read; install them again with '{INSTALL}'") from error


def _as_input(picture: Picture) -> Tensor:
    unit = torch.from_numpy(np.ascontiguousarray(np.moveaxis(as_unit(picture), -1, 0))).float()
    return (unit * 2 - 1)[None]


@torch.no_grad()
def st_lpips(a: Picture, b: Picture) -> float | None:
    """ST-LPIPS (AlexNet variant) of two pictures [H, W, 3], uint8 or floats in [0, 1]; 0 for identical ones.

    None where the optional package is not installed: the number is never made up by another; and of pictures that are too
    small for the network.
    """
    path = weights_path()
    first, second = _as_input(a), _as_input(b)
    if path is None or min(first.shape[2:]) < SMALLEST:
        return None
    return float(_network(path)(first, second))
