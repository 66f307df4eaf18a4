"""Statistics of one input of random rows, and the rows."""

from __future__ import annotations

import torch

from ditq.calibration.accumulate import InputAccumulator
from ditq.calibration.input_statistics import InputStatistics


def random_input(bins: int = 2, width: int = 24, count: int = 40) -> tuple[InputStatistics, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = InputAccumulator("x", width, bins, count, 0)
    parts = [torch.randn(count, width, generator=generator) * (1 + number) + 0.5 for number in range(bins)]
    for number, part in enumerate(parts):
        assert found.add(part, number)
    return InputStatistics(**found.tensors()), parts
