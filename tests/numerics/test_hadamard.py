import pytest
import torch

from ditq.numerics.hadamard import hadamard, is_hadamard_order, regular_hadamard, two_factors

# Widths of the diffusion transformers in diffusers (tokens, feed-forward, and both side by side) and their head sizes.
WIDTHS = [384, 768, 1024, 1152, 1408, 1536, 1920, 2048, 2240, 2304, 2432, 2560, 2880, 3072, 3840, 4096, 4608, 5120]
WIDTHS += [5600, 5632, 6144, 6912, 7680, 8192, 8960, 9216, 9728, 10240, 12288, 13824, 14336, 15360, 18432]
HEADS = [32, 64, 72, 88, 96, 128, 256]


def is_hadamard(matrix: torch.Tensor) -> bool:
    n = len(matrix)
    return bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", WIDTHS + HEADS)
def test_every_width_has_two_hadamard_factors(n: int) -> None:
    a, b = two_factors(n)
    assert a * b == n and is_hadamard(hadamard(a)) and is_hadamard(hadamard(b))


@pytest.mark.parametrize("n", [1, 2, 72, 88, 140, 180, 700, 1152])
def test_the_matrix_itself_is_built_too(n: int) -> None:
    assert is_hadamard(hadamard(n))


@pytest.mark.parametrize(("n", "field"), [(28, 27), (20, 9), (52, 25), (100, 49)])
def test_fields_of_prime_powers_are_built(n: int, field: int) -> None:
    # n = field + 1 (Paley I) or 2 (field + 1) (Paley II); 52 and 100 exist in no other way here
    assert n in (field + 1, 2 * (field + 1)) and is_hadamard(hadamard(n))


@pytest.mark.parametrize(("n", "factors"), [(1152, (32, 36)), (2432, (32, 76)), (13824, (108, 128)), (5600, (56, 100))])
def test_the_factors_have_the_least_sum(n: int, factors: tuple[int, int]) -> None:
    assert two_factors(n) == factors
    sums = [a + n // a for a in range(1, n + 1) if n % a == 0 and is_hadamard_order(a) and is_hadamard_order(n // a)]
    assert sum(factors) == min(sums)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 50, 92, 116, 156])
def test_an_order_that_cannot_be_built_is_refused_in_one_line(n: int) -> None:
    assert not is_hadamard_order(n)
    with pytest.raises(ValueError, match=f"order {n} ") as error:
        hadamard(n)
    assert "\n" not in str(error.value)


def test_a_matrix_can_be_changed_without_changing_the_next_one() -> None:
    hadamard(12).zero_()
    assert is_hadamard(hadamard(12))


@pytest.mark.parametrize("n", [1, 4, 16, 36, 64, 144, 256])
def test_a_regular_matrix_is_hadamard_and_all_its_rows_and_columns_sum_alike(n: int) -> None:
    matrix = regular_hadamard(n)
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    for dim in (0, 1):
        assert torch.equal(matrix.sum(dim), torch.full((n,), float(n) ** 0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, 2, 8, 32, 72, 100])
def test_other_orders_have_no_regular_matrix_here(n: int) -> None:
    with pytest.raises(ValueError, match="no regular Hadamard matrix"):
        regular_hadamard(n)
