"""The bytes of tensors, however they lie."""

from __future__ import annotations

import pytest
import torch

from ditq.numerics.raw_bytes import raw_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_they_are_those_of_a_plain_copy(dtype: torch.dtype) -> None:
    plain = torch.arange(12).reshape(3, 4).to(dtype)
    for tensor in (plain, plain.T, plain[:, 1:3], plain[1, 1].expand(1), plain[1, 1].expand(3), plain[0, 0], plain[:0]):
        wanted = torch.tensor(tensor.tolist(), dtype=dtype).reshape(-1)
        assert raw_bytes(tensor).numpy().tobytes() == wanted.view(torch.uint8).numpy().tobytes()
