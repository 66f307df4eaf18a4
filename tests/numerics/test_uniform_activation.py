import pytest
import torch

from ditq.numerics.uniform import absmax_scale, largest_integer, quantize_per_tensor, quantize_per_token


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_token_is_within_half_a_step(bits: int) -> None:
    x = torch.randn(2, 5, 33, dtype=torch.float64) * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None]
    q, scale = quantize_per_token(x, bits)
    assert scale.shape == (2, 5, 1) and torch.equal(q, q.round())
    assert torch.equal(q.abs().amax(dim=-1), torch.full((2, 5), float(largest_integer(bits)), dtype=torch.float64))
    assert bool(((q * scale - x).abs() <= scale * 0.5 * (1 + 1e-12)).all())


def test_a_given_scale_clips_symmetrically() -> None:
    x = torch.tensor([-100.0, -1.5, -0.5, 0.5, 1.5, 2.5, 100.0])
    assert quantize_per_tensor(x, torch.tensor(1.0), 4).tolist() == [-7, -2, 0, 0, 2, 2, 7]  # half to even


def test_an_all_zero_token_stays_zero() -> None:
    q, scale = quantize_per_token(torch.zeros(1, 8), 8)
    assert float(scale) == pytest.approx(1e-8) and not q.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_integers_of_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    q, scale = quantize_per_token(x, 8)
    expected, expected_scale = quantize_per_token(x.float(), 8)
    assert torch.equal(q, expected) and torch.equal(scale, expected_scale)


def test_the_scale_covers_the_magnitude() -> None:
    assert float(absmax_scale(torch.tensor(12.7), 8)) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        absmax_scale(torch.tensor(1.0), 1)
